"""What evaluations look for when a run starts, and what they leave behind between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import Evaluation
from callbacks.results import FILE_NAME, read_results
from fewstep.errors import FewstepError
from fewstep.metrics import FrechetDistance, Metric, SlicedWasserstein
from lightning_modules import ConsistencyDistillation

from metric_cases import Flat
from rings import Run


class Looking(Flat):
    """Features with a network, which note where it is."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.prepared = 0

    def prepare(self) -> None:
        self.prepared += 1

    def load(self, device: torch.device) -> None:
        self.places.append(f"loaded on {device}")

    def to(self, device: torch.device) -> None:
        self.places.append(f"moved to {device}")


def test_between_evaluations_what_they_look_through_leaves_the_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, released = Looking(), []

    class Companions:
        def release(self) -> None:
            released.append(True)

    callback = Evaluation(
        [FrechetDistance(features)], [1], 20, every_n_updates=2, max_share=1.0, batch_size=20
    )

    class Pipeline(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            module.companions = Companions()

        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            module.companions = None

    monkeypatch.setattr(ConsistencyDistillation, "sample", lambda self, noise, *args: noise)
    monkeypatch.setattr(ConsistencyDistillation, "decode", lambda self, samples: samples)
    run([Pipeline(), callback], updates=4)
    assert features.prepared == 1
    assert features.places == ["loaded on cpu", *["moved to cpu"] * 3]
    assert len(released) == 2


class Demanding(SlicedWasserstein):
    """A metric of many samples with prompts."""

    def __init__(self, least: int = 0, needs_prompts: bool = False) -> None:
        super().__init__()
        self.least, self.needs_prompts = least, needs_prompts

    def check(self, num_samples: int) -> None:
        if num_samples < self.least:
            raise FewstepError(f"{num_samples} are too few")


class Refusing(pl.Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        raise AssertionError("trained before it looked")


class Unprepared(Looking):
    def prepare(self) -> None:
        raise FewstepError("get the weights")


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        (FrechetDistance(Unprepared()), {}, "get the weights"),
        (Demanding(least=301), {}, r"num_samples: 300 are too few"),
        (
            Demanding(least=51),
            {"every_n_updates": 100, "num_samples_in_training": 50},
            r"num_samples_in_training: 50 are too few",
        ),
        (Demanding(needs_prompts=True), {}, "Demanding can only measure samples with prompts"),
        (SlicedWasserstein(), {"roles": ["ema", "critic"]}, r"`roles` has 'critic'.*'teacher'"),
    ],
)
def test_a_mistake_in_the_set_up_is_found_before_the_first_update(
    run: Run, metric: Metric, options: dict[str, Any], message: str
) -> None:
    callback = Evaluation([metric], **{"num_samples": 300, **options})
    with pytest.raises(FewstepError, match=message):
        run([Refusing(), callback])


def test_a_teacher_to_compare_with_is_looked_for_at_the_start(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConsistencyDistillation, "sampling_roles", lambda self: ["student"])
    with pytest.raises(FewstepError, match="has no teacher to compare with"):
        run([Evaluation([SlicedWasserstein()], against=["teacher"]), Refusing()])


def test_beside_the_data_a_missing_teacher_is_left_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConsistencyDistillation, "sampling_roles", lambda self: ["student"])
    callback = Evaluation([SlicedWasserstein()], [1], 50, against=["data", "teacher"])
    trainer = run([callback], updates=1)
    results = read_results(Path(trainer.default_root_dir) / FILE_NAME)
    assert {entry["metric"] for entry in results["measurements"]} == {"sliced_wasserstein"}


def test_numbers_of_evaluations_that_never_come_are_not_asked_after(run: Run) -> None:
    run([Evaluation([Demanding(least=40)], [1], 50, num_samples_in_training=10)], updates=1)
