"""Samples of an evaluation when something goes wrong with them, and in which precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.generation import Cell, Scene
from datamodules import RingData
from fewstep.errors import FewstepError
from fewstep.metrics import Rows, Samples, SlicedWasserstein
from lightning_modules import ConsistencyDistillation
from lightning_modules.parallel import ReplicatedStrategy

from ranks import run_ranks
from rings import Run, quiet_trainer, ring_teacher

CELL = Cell("teacher", 2, 0)


class Spoilt(ConsistencyDistillation):
    """Makes chosen samples NaN or infinite, by what they are counted as on their rank."""

    spoilt: Mapping[int, float] = {}
    made = 0

    def sample(self, noise: Tensor, *args: Any, **options: Any) -> Tensor:
        found = super().sample(noise, *args, **options)
        for place in range(len(found)):
            found[place] += self.spoilt.get(self.made + place, 0.0)
        self.made += len(found)
        return found


def scene(folder: Path, world_size: int = 1, batch_size: int = 4, **options: Any) -> Scene:
    """A run of one update, ready to be measured."""
    if world_size > 1:
        options |= {"strategy": ReplicatedStrategy(), "devices": world_size}
    trainer: pl.Trainer = quiet_trainer(folder, [], 1, **options)
    data = RingData(batch_size=16, reference_samples=64)
    trainer.fit(Spoilt(ring_teacher, 50), data, weights_only=True)
    return Scene(trainer, trainer.lightning_module, batch_size)


def collected(place: Scene, metric: SlicedWasserstein | None = None) -> str:
    """How a cell of 20 samples ends."""
    samples = place.generated(CELL, 20)
    try:
        (found,) = place.collected([metric or SlicedWasserstein()], samples, CELL.described())
    except Exception as error:
        place.trainer.strategy.barrier()  # all ranks are out
        return f"{type(error).__name__}: {error}"
    assert isinstance(found, Rows)
    return f"{len(found)} samples"


def test_samples_that_are_no_numbers_end_an_evaluation(tmp_path: Path) -> None:
    place = scene(tmp_path)
    assert collected(place) == "20 samples"
    module: Any = place.module
    module.made, module.spoilt = 0, {3: torch.nan, 11: torch.inf, 19: -torch.inf}
    with pytest.raises(FewstepError, match=r"3 of 20 samples of 'teacher' at 2 steps.*diverged"):
        place.collected([SlicedWasserstein()], place.generated(CELL, 20), CELL.described())


def test_records_that_are_no_numbers_are_refused_too(run: Run) -> None:
    trainer = run([], updates=1)
    place = Scene(trainer, trainer.lightning_module, 4)
    records = [Samples(torch.full((2, 2), torch.nan), torch.arange(2))]
    with pytest.raises(FewstepError, match="2 of 2 records are not finite"):
        place.collected([SlicedWasserstein()], records, "records")


def spoilt_on_ranks(folder: Path, spoilt: Sequence[Mapping[int, float]]) -> str:
    place = scene(folder, len(spoilt))
    module: Any = place.module
    module.spoilt = spoilt[place.trainer.global_rank]
    return collected(place)


def test_ranks_count_them_together(tmp_path: Path) -> None:
    found = run_ranks(2, spoilt_on_ranks, tmp_path, [{0: torch.nan}, {1: torch.nan, 2: torch.inf}])
    assert found[0] == found[1]
    assert "3 of 20 samples of 'teacher'" in found[0]
    assert run_ranks(2, spoilt_on_ranks, tmp_path, [{}, {}]) == ["20 samples", "0 samples"]


class Failing(SlicedWasserstein):
    """A metric whose statistics fail at a batch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def statistics(self) -> Rows:
        return FailingRows(self.at)


class FailingRows(Rows):
    def __init__(self, at: int, most: int | None = None) -> None:
        super().__init__(["pixels"], most)
        self.at, self.batches = at, 0

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        self.batches += 1
        if self.batches == self.at:
            raise FewstepError("cannot look at this")
        super().update(features, samples)


def fail_on_second(folder: Path, where: str) -> tuple[str, int, int]:
    """The second of two ranks fails at its first batch.

    Returns:
        how each ends, how many batches it generated, and how often it asked whether to stop.
    """
    place = scene(folder, 2)
    second = place.trainer.global_rank == 1
    module: Any = place.module
    sample = module.sample
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if second and where == "sampling":
            raise RuntimeError("out of memory")
        found: Tensor = sample(*args, **options)
        return found

    module.sample = counted
    failing = Failing(1) if second and where == "metric" else None
    looks: list[pl.Trainer] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("callbacks.generation.leave_if_requested", looks.append)
        ending = collected(place, failing)
    return ending, len(calls), len(looks)


def test_a_rank_whose_metric_fails_ends_all_and_generates_with_the_others(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_on_second, tmp_path, "metric")
    assert first == second == ("FewstepError: cannot look at this", 3, 3)


def test_a_rank_that_fails_to_sample_ends_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_on_second, tmp_path, "sampling")
    assert first[0].startswith("FewstepError: Rank 1 failed")
    assert second[0] == "RuntimeError: out of memory"
    assert first[1:] == (3, 3)
    assert second[1:] == (1, 3), "the others ask together with it whether to stop"


def test_samples_are_made_in_the_runs_precision_and_decoded_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = scene(tmp_path, precision="bf16-mixed")
    found: dict[str, bool] = {}
    module: Any = place.module

    def noted(name: str) -> Any:
        work = getattr(module, name)

        def noting(*args: Any, **options: Any) -> Tensor:
            found[name] = torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
            result: Tensor = work(*args, **options)
            return result

        return noting

    for name in ("sample", "decode"):
        monkeypatch.setattr(module, name, noted(name))
    list(place.generated(CELL, 4))
    assert found == {"sample": True, "decode": False}
