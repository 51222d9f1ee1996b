"""What depth does to a stream, as it is logged while a network trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import Sensitivity
from callbacks.sensitivity import end_to_end
from fewstep.errors import FewstepError
from fewstep.networks.gates.streams import StreamNorms
from scripts.loggers import MetricsCSV, read_metrics

from training_runs import data_for, method, trainer_of

STACK = "student.backbone.transformer.transformer_blocks"


class Ends(pl.Callback):
    """The first block's input and the last one's output in the first pass of each update."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen: list[torch.Tensor] = []
        blocks = list(pl_module.get_submodule(STACK).children())
        blocks[0].register_forward_hook(lambda block, args, output: self.keep(args[0]))
        blocks[-1].register_forward_hook(lambda block, args, output: self.keep(output))

    def keep(self, stream: torch.Tensor) -> None:
        if stream.requires_grad:
            stream.retain_grad()
            self.seen.append(stream)


def logged(folder: Path, updates: int, *callbacks: pl.Callback, name: str = "gated") -> Any:
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    trainer = trainer_of("single", 1, updates, *callbacks, folder=folder)
    trainer.loggers = [MetricsCSV(folder)]
    trainer.fit(method(name, accumulate=2), data_for(name), weights_only=True)
    return read_metrics(folder)


@pytest.mark.parametrize("name", ["gated", "teacher"])
def test_ratios_are_those_of_the_first_micro_batch_with_gates_and_without(
    name: str, tmp_path: Path
) -> None:
    ends = Ends()
    found = logged(tmp_path, 2, ends, Sensitivity(every_n_updates=1), name=name)
    for update, (first, last) in enumerate([ends.seen[:2], ends.seen[4:6]], 1):
        assert first.grad is not None
        assert last.grad is not None
        gradient = (first.grad.norm() / last.grad.norm()).item()
        stream = (last.norm() / first.norm()).item()
        assert dict(found["sensitivity/amplification"])[update] == pytest.approx(gradient, rel=1e-4)
        assert dict(found["sensitivity/growth"])[update] == pytest.approx(stream, rel=1e-4)


def test_by_default_the_last_update_alone_is_measured(tmp_path: Path) -> None:
    found = logged(tmp_path, 3, Sensitivity())
    assert [step for step, _ in found["sensitivity/amplification"]] == [3]


def test_what_was_not_differentiated_has_no_ratio() -> None:
    one = torch.tensor(2.0)
    assert end_to_end([]) == {}
    assert end_to_end([StreamNorms("a", "sample", one, one, one)]) == {"sensitivity/growth": 1.0}


def test_a_negative_number_of_updates_is_refused() -> None:
    with pytest.raises(FewstepError, match="every_n_updates from 0 on"):
        Sensitivity(every_n_updates=-1)
