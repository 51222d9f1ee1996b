"""Evaluations of steered samples: what they are compared with, what is counted, who may judge."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from callbacks import Evaluation
from callbacks.generation import Cell, Scene
from callbacks.judges import check_judges
from callbacks.matrix import Matrix
from callbacks.reference_sets import ReferenceSets
from datamodules import RingData
from fewstep.errors import FewstepError
from fewstep.guidance import (
    ClassLabel,
    CLIPDistance,
    CLIPStyle,
    Energy,
    Guidance,
    MixtureLikelihood,
    Normalised,
    Scheduled,
    Target,
)
from fewstep.metrics import (
    ClassAccuracy,
    CLIPFeatures,
    CLIPScore,
    Features,
    FrechetDistance,
    GuideAndJudge,
    ReferenceStore,
    Samples,
    SlicedWasserstein,
)
from fewstep.metrics.clip import CLIPFrechetDistance
from fewstep.networks import ring
from lightning_modules import ConsistencyDistillation, Steering
from lightning_modules.parallel import ReplicatedStrategy

from metric_cases import save_clip
from ranks import run_ranks
from rings import quiet_trainer, ring_teacher

STRONG = Steering(Guidance(MixtureLikelihood(ring(5)), Normalised(0.2)))


class Together(ConsistencyDistillation):
    """Ranks meet after each batch, as they do within sharded networks."""

    def sample(self, noise: Tensor, *args: Any, **options: Any) -> Tensor:
        found = super().sample(noise, *args, **options)
        if dist.is_initialized():
            dist.all_reduce(torch.ones(1))
        return found


def scene(folder: Path, steering: Steering | None, world_size: int = 1) -> Scene:
    """A run of one update, ready to be measured."""
    options: dict[str, Any] = {}
    if world_size > 1:
        options = {"strategy": ReplicatedStrategy(), "devices": world_size}
    trainer: pl.Trainer = quiet_trainer(folder, [], 1, **options)
    module = Together(ring_teacher, 50)
    trainer.fit(module, RingData(batch_size=16, reference_samples=64), weights_only=True)
    if steering is not None:
        module.steer(steering)
    return Scene(trainer, module, 4)


def pixels(place: Scene, cell: Cell) -> Tensor:
    return torch.cat([batch.pixels for batch in place.generated(cell, 12)])


def test_the_teacher_as_reference_is_not_steered(tmp_path: Path) -> None:
    plain = scene(tmp_path, None)
    wanted = pixels(plain, plain.reference_cell("teacher", 3, 2**31 - 1))
    steered = scene(tmp_path, STRONG)
    cell = Cell("teacher", 3, 2**31 - 1)
    assert (pixels(steered, cell) - wanted).abs().max() > 0.1
    metric = SlicedWasserstein()
    references = ReferenceSets([metric], ReferenceStore(tmp_path / "store"), 3, 12)
    (found,) = references.statistics(steered, "teacher")
    assert torch.equal(found["pixels"], wanted)  # type: ignore[index]
    assert torch.equal(pixels(steered, steered.reference_cell("teacher", 3, 2**31 - 1)), wanted)
    matrix = Matrix(steered, references, ["teacher"], 12)
    partners = matrix._partners(cell, [cell])
    assert torch.equal(pixels(steered, partners["_to_teacher"]), wanted)
    assert (pixels(steered, cell) - wanted).abs().max() > 0.1  # and is again afterwards


def counted(folder: Path, world_size: int) -> list[dict[str, str]]:
    """The table of an evaluation of 12 samples in batches of 4 at most."""
    place = scene(folder, STRONG, world_size)
    module: Any = place.module
    cell = Cell("teacher", 2, 0)
    place.collected([SlicedWasserstein()], place.generated(cell, 12), cell.described())
    module.write_traces()
    if place.trainer.global_rank:
        return []
    with (folder / "guidance.csv").open() as file:
        return list(csv.DictReader(file))


def test_samples_that_only_keep_ranks_in_step_are_not_counted(tmp_path: Path) -> None:
    """Of two ranks one has two batches, and the other one and a repeated one."""
    (alone, _) = run_ranks(2, counted, tmp_path / "two", 2)
    whole = counted(tmp_path / "one", 1)
    assert {row["samples"] for row in alone} == {"12"} == {row["samples"] for row in whole}
    for row, same in zip(alone, whole, strict=True):
        for name in ("loss", "gradient_norm", "displacement"):
            assert float(row[name]) == pytest.approx(float(same[name]), rel=1e-4)


class Cliff(Energy):
    """Throws samples far away where they are told to."""

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        height = 1e6 if dist.is_initialized() and dist.get_rank() == 1 else 1e-3
        return height * x0.sum(1)


def fallen(folder: Path) -> tuple[str, float]:
    place = scene(folder, Steering(Guidance(Cliff(), Scheduled(1.0)), target=None), 2)
    cell, started = Cell("student", 2, 0), time.monotonic()
    try:
        place.collected([SlicedWasserstein()], place.generated(cell, 24), cell.described())
    except FewstepError as error:
        return str(error), time.monotonic() - started
    return "no error", 0.0


def test_guidance_that_diverges_on_one_rank_ends_all(tmp_path: Path) -> None:
    found = run_ranks(2, fallen, tmp_path, timeout=60)
    assert all("Guidance diverged" in message for message, _ in found)


def test_alone_it_ends_at_once(tmp_path: Path) -> None:
    place = scene(tmp_path, Steering(Guidance(Cliff(), Scheduled(1e6)), target=None))
    module: Any = place.module
    with pytest.raises(FewstepError, match="Guidance diverged"):
        module.sample(torch.randn(4, 2), None, 2)
    module.check_guidance()  # nothing is left to be said


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(2, 5).eval()


class Lazy(Features):
    """Features of a network that is there once it is loaded."""

    name = "lazy"

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, 0
        self.network: nn.Module | None = None

    def prepare(self) -> None: ...

    def load(self, device: torch.device) -> None:
        self.network = nn.Sequential(network(self.seed)).to(device)

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        self.asked += 1
        assert self.network is not None
        return {"features": self.network(samples.pixels).detach()}

    def protocol(self) -> dict[str, Any]:
        return {"name": self.name}


def measured(folder: Path, features: Features) -> None:
    """A run of one update, whose samples are guided by network 0, with an evaluation."""
    module = ConsistencyDistillation(ring_teacher, 50)
    module.steer(Steering(Guidance(ClassLabel(network(0)), Normalised(0.01))))
    store = str(folder / "store")
    callback = Evaluation([FrechetDistance(features)], [2], 32, references=store)
    data = RingData(batch_size=16, reference_samples=64)
    quiet_trainer(folder, [callback], 1).fit(module, data, weights_only=True)


def test_features_of_the_guides_own_network_measure_nothing(tmp_path: Path) -> None:
    guide, other = Lazy(0), Lazy(1)
    with pytest.raises(FewstepError, match="would judge samples by the Sequential that guides"):
        measured(tmp_path, guide)
    assert guide.asked == 0
    measured(tmp_path, other)
    assert other.asked > 0


def guided_by(energy: Energy | None) -> ConsistencyDistillation:
    module = ConsistencyDistillation(ring_teacher, 50)
    module.steer(Steering(None if energy is None else Guidance(energy, Normalised(0.1))))
    return module


def test_clip_judges_no_samples_that_it_guided(tmp_path: Path) -> None:
    folder = str(save_clip(tmp_path))
    scores = [CLIPScore(CLIPFeatures(folder)), CLIPFrechetDistance(CLIPFeatures(folder))]
    guides = [guided_by(CLIPDistance(folder)), guided_by(CLIPStyle(folder, layer=1))]
    for score in scores:
        assert score.features is not None
        score.features.load(torch.device("cpu"))
        for module in guides:
            with pytest.raises(FewstepError, match="by the CLIPModel that guides"):
                check_judges([score], module)
        check_judges([score], guided_by(ClassLabel(network(0))))
        check_judges([score], guided_by(None))


def test_the_guide_that_a_metric_names_has_to_have_guided() -> None:
    metric = ClassAccuracy(GuideAndJudge(network(0), network(1)))
    check_judges([metric], guided_by(ClassLabel(nn.Sequential(network(0)))))
    check_judges([metric], guided_by(None))  # unguided samples, for comparison
    check_judges([metric], ConsistencyDistillation(ring_teacher, 50))
    with pytest.raises(FewstepError, match=r"takes a Linear for the guide.*guided by Linear"):
        check_judges([metric], guided_by(ClassLabel(network(2))))
    with pytest.raises(FewstepError, match="guided by no network"):
        check_judges([metric], guided_by(MixtureLikelihood(ring(5))))
