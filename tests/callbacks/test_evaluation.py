"""Evaluations of a small ring run: which numbers, from which samples, against which reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import Evaluation
from callbacks.generation import Cell, Scene, batches_of
from callbacks.matrix import Matrix
from callbacks.results import read_results
from datamodules import RingData
from fewstep.diffusion import AnalyticDenoiser, ode_sample
from fewstep.errors import FewstepError
from fewstep.metrics import (
    Metric,
    ReferenceStore,
    Rows,
    SlicedWasserstein,
    Statistics,
    sliced_wasserstein,
)
from fewstep.metrics.base import Better
from fewstep.seeding import torch_generator
from lightning_modules import ConsistencyDistillation
from lightning_modules.parallel import ReplicatedStrategy

from ranks import run_ranks
from rings import Run, quiet_trainer, ring_teacher

STOCHASTIC = Cell("ema", 4, 0)


def values(trainer: pl.Trainer) -> dict[tuple[str, int], float]:
    path = Path(trainer.default_root_dir) / "results.json"
    entries = read_results(path)["measurements"]
    return {(entry["metric"], entry["num_steps"]): entry["value"] for entry in entries}


def evaluation(**options: Any) -> Evaluation:
    defaults: dict[str, Any] = {"num_steps": [1, 4], "num_samples": 300, "batch_size": 128}
    return Evaluation([SlicedWasserstein()], **defaults | options)


def test_results_hold_every_combination_with_its_protocol(run: Run) -> None:
    trainer = run([evaluation(roles=["ema", "teacher"], seeds=[0, 1])])
    results = read_results(Path(trainer.default_root_dir) / "results.json")
    found = {(m["role"], m["num_steps"], m["seed"]) for m in results["measurements"]}
    assert found == {(r, n, s) for r in ("ema", "teacher") for n in (1, 4) for s in (0, 1)}
    entry = results["measurements"][0]
    assert entry["num_samples"] == 300
    assert entry["protocol"]["reference"]["records"] == 512
    assert entry["protocol"]["metric"] == "sliced_wasserstein"
    assert results["student_updates"] == 4
    assert results["environment"]["torch"] == torch.__version__.split("+")[0]


def test_a_measured_number_is_that_of_samples_made_by_hand(run: Run) -> None:
    trainer = run([evaluation(roles=["teacher"], num_steps=[4], num_samples=128)])
    (entry,) = read_results(Path(trainer.default_root_dir) / "results.json")["measurements"]
    data = RingData(batch_size=64, reference_samples=512)
    reference = torch.cat([b["sample"] for b in data.reference_batches()])
    labels = data.reference_conditions(range(128)).cond["class_labels"]
    sources = [torch_generator(0, "evaluation-noise", n) for n in range(128)]
    noise = torch.stack([torch.randn(2, generator=source) for source in sources])
    teacher = ring_teacher()
    exact = AnalyticDenoiser(teacher.backbone.mixture, teacher.schedule)  # type: ignore[arg-type]
    samples = ode_sample(
        exact, noise.double(), {"class_labels": labels}, teacher.schedule.spaced_times(4)
    )
    directions = SlicedWasserstein().directions(2)
    by_hand = float(sliced_wasserstein(samples, reference.double(), directions))
    assert entry["value"] == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(250, 100), (7, 3), (2, 512), (64, 8)])
def test_ranks_share_all_samples_in_equally_many_batches(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    shares = [
        list(batches_of(num_samples, batch_size, rank, world_size)) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [n for share in shares for numbers, counts in share if counts for n in numbers]
    assert sorted(counted) == list(range(num_samples))
    assert all(0 < len(numbers) <= batch_size for share in shares for numbers, _ in share)


def test_samples_do_not_depend_on_the_batch_they_are_made_in(run: Run) -> None:
    trainer = run([], updates=1)
    module = trainer.lightning_module
    made = [
        torch.cat([s.pixels for s in Scene(trainer, module, size).generated(STOCHASTIC, 20)])
        for size in (20, 7)
    ]
    torch.testing.assert_close(made[0], made[1])
    other = Cell(STOCHASTIC.role, STOCHASTIC.num_steps, 1)
    (different,) = Scene(trainer, module, 20).generated(other, 20)
    assert not torch.allclose(made[0], different.pixels)


def test_measuring_again_replaces_like_and_keeps_the_rest(run: Run, tmp_path: Path) -> None:
    trainer = run([evaluation()])
    path = Path(trainer.default_root_dir) / "results.json"
    content = json.loads(path.read_text())
    content["measurements"][0]["value"] = -1.0
    extra = dict(content["measurements"][0], seed=99)
    content["measurements"].append(extra)
    path.write_text(json.dumps(content))
    run([evaluation()])
    again = read_results(path)["measurements"]
    assert len(again) == 3
    assert [m["value"] for m in again if m["seed"] == 99] == [-1.0]
    assert all(m["value"] > 0 for m in again if m["seed"] == 0)


def test_results_of_other_weights_are_not_mixed_in(run: Run) -> None:
    trainer = run([evaluation()], updates=2)
    path = Path(trainer.default_root_dir) / "results.json"
    content = json.loads(path.read_text())
    content["measurements"].append(dict(content["measurements"][0], seed=99))
    path.write_text(json.dumps(content))
    run([evaluation()], updates=3)
    results = read_results(path)
    assert results["student_updates"] == 3
    assert all(m["seed"] == 0 for m in results["measurements"])


def test_a_damaged_results_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(FewstepError, match="Delete it and run `fewstep evaluate`"):
        read_results(path)


def test_data_without_a_reference_is_refused(run: Run) -> None:
    class Bare(pl.LightningDataModule):
        pass

    trainer = run([], updates=1)
    trainer.datamodule = Bare()  # type: ignore[attr-defined]
    with pytest.raises(FewstepError, match="Bare has no reference_batches"):
        evaluation().run(trainer, trainer.lightning_module, 10, [0])


def test_evaluations_come_at_the_stated_updates(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = evaluation(every_n_updates=2, num_samples_in_training=50, max_share=1.0)
    seen: list[tuple[int, int]] = []

    def record(trainer: pl.Trainer, module: Any, num_samples: int, seeds: Any) -> list[Any]:
        seen.append((trainer.global_step, num_samples))
        return []

    monkeypatch.setattr(callback, "run", record)
    monkeypatch.setattr("callbacks.evaluation.write_results", lambda *args: None)
    run([callback], updates=6)
    assert seen == [(2, 50), (4, 50), (6, 300)]


def test_evaluations_in_training_keep_to_their_share_of_the_time(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds an update and thirty an evaluation, by a clock that only these move."""
    now = [0.0]
    monkeypatch.setattr("callbacks.evaluation.time.monotonic", lambda: now[0])
    callback = evaluation(every_n_updates=1, max_share=0.5)
    seen: list[int] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            now[0] += 10

    def measure(self: Matrix, cells: Any) -> list[Any]:
        seen.append(self.scene.trainer.global_step)
        now[0] += 30
        return []

    monkeypatch.setattr(Matrix, "measure", measure)
    monkeypatch.setattr(Evaluation, "_report", lambda *args: None)
    run([Clock(), callback], updates=13)
    # 40 s after the first; the next fits when 60 <= 0.5 (t + 30), which is at 90 s, and so on.
    assert seen == [1, 6, 9, 12, 13]


def test_reference_statistics_are_computed_once_and_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"references": str(tmp_path / "kept"), "roles": ["teacher"]}
    first = values(run([evaluation(**options)]))
    assert len(list((tmp_path / "kept").iterdir())) == 1

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read the reference again")

    with monkeypatch.context() as patch:
        patch.setattr(RingData, "reference_batches", refuse)
        assert values(run([evaluation(**options)])) == first
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:-8])
    assert values(run([evaluation(**options)])) == first  # damaged: computed anew


def test_other_data_has_statistics_of_its_own(tmp_path: Path) -> None:
    store, metric = ReferenceStore(tmp_path), SlicedWasserstein()
    paths = {store.path(metric, RingData(num_modes=n).reference_protocol()) for n in (4, 5)}
    assert len(paths) == 2
    assert store.path(SlicedWasserstein(8), RingData().reference_protocol()) not in paths


def test_students_are_compared_with_their_teachers_samples(run: Run) -> None:
    options = {"against": ["data", "teacher"], "teacher_steps": 20, "num_samples": 512}
    trainer = run([evaluation(roles=["teacher"], num_steps=[1, 20], **options)])
    found = values(trainer)
    assert set(found) == {
        (name, steps)
        for name in ("sliced_wasserstein", "sliced_wasserstein_to_teacher")
        for steps in (1, 20)
    }
    # The teacher itself is as near as two finite sets of one distribution are; one step is not.
    near, far = (found["sliced_wasserstein_to_teacher", steps] for steps in (20, 1))
    assert near < 0.1
    assert far > 2 * near


class PairedDistance(Metric):
    """Mean distance of samples made of the same noise."""

    reference = "pairs"
    pairs = 100

    def __init__(self) -> None:
        self.better: dict[str, Better] = {"distance": "lower"}

    def statistics(self) -> Rows:
        return Rows(["pixels"], self.pairs)

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        assert isinstance(reference, Rows)
        assert len(generated) == len(reference)
        difference = generated["pixels"] - reference["pixels"]
        return {"distance": float(difference.norm(dim=1).mean())}

    def protocol(self) -> dict[str, Any]:
        return {"metric": "distance"}


def test_samples_of_the_same_noise_are_compared_in_pairs(run: Run) -> None:
    callback = Evaluation(
        [PairedDistance()],
        num_steps=[1, 100, 400],
        roles=["teacher"],
        num_samples=150,
        teacher_steps=800,
    )
    found = values(run([callback]))
    assert set(found) == {
        ("distance_to_400_steps", 1),
        ("distance_to_400_steps", 100),
        *(("distance_to_teacher", steps) for steps in (1, 100, 400)),
    }
    # A first-order solver's error falls like 1 / steps: (1/100 - 1/800) / (1/400 - 1/800) = 7.
    ratio = found["distance_to_teacher", 100] / found["distance_to_teacher", 400]
    assert ratio == pytest.approx(7, rel=0.2)
    assert found["distance_to_400_steps", 1] > 5 * found["distance_to_400_steps", 100]


def test_fewer_samples_than_a_metric_would_pair_are_all_paired(run: Run) -> None:
    trainer = run([Evaluation([PairedDistance()], [1], 30, roles=["teacher"], teacher_steps=5)])
    (entry,) = read_results(Path(trainer.default_root_dir) / "results.json")["measurements"]
    assert (entry["metric"], entry["num_samples"]) == ("distance_to_teacher", 30)


class WithMean(SlicedWasserstein):
    """A metric that also says something of the samples alone."""

    own_values = frozenset({"mean"})

    def __init__(self) -> None:
        super().__init__()
        self.better = {"mean": "lower", **self.better}

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        mean = float(generated["pixels"].mean())
        return {"mean": mean, **super().compute(generated, reference)}


def test_what_the_reference_has_no_part_in_is_said_once(run: Run) -> None:
    options: dict[str, Any] = {"num_steps": [1], "num_samples": 50, "teacher_steps": 4}
    trainer = run([Evaluation([WithMean()], against=["data", "teacher"], **options)])
    path = Path(trainer.default_root_dir) / "results.json"
    entries = {m["metric"]: m for m in read_results(path)["measurements"]}
    assert set(entries) == {"mean", "sliced_wasserstein", "sliced_wasserstein_to_teacher"}
    assert "reference" not in entries["mean"]["protocol"]
    path.unlink()
    run([Evaluation([WithMean()], against=["teacher"], **options)])
    assert set(values(trainer)) == {("mean", 1), ("sliced_wasserstein_to_teacher", 1)}


class Failing(SlicedWasserstein):
    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        raise FewstepError("too few samples")


def test_a_metric_that_fails_ends_the_evaluation_with_its_message(run: Run) -> None:
    with pytest.raises(FewstepError, match="too few samples"):
        run([Evaluation([Failing()], num_steps=[1], num_samples=10)])


def test_the_time_of_evaluations_is_in_the_results(run: Run) -> None:
    trainer = run([evaluation()])
    cost = read_results(Path(trainer.default_root_dir) / "results.json")["evaluation"]
    assert cost["seconds"] > 0
    assert 0 < cost["share_of_run"] < 1


def on_ranks(folder: Path, world_size: int) -> dict[tuple[str, int], float]:
    callback = evaluation(
        num_samples=130, batch_size=50, roles=["teacher"], references=str(folder / "kept")
    )
    strategy = ReplicatedStrategy() if world_size > 1 else "auto"
    place = folder / str(world_size)
    trainer = quiet_trainer(place, [callback], 2, strategy=strategy, devices=world_size)
    module = ConsistencyDistillation(ring_teacher, 50)
    data = RingData(batch_size=64 // world_size, reference_samples=256)
    trainer.fit(module, data, weights_only=True)
    trainer.strategy.barrier()
    return values(trainer)


def test_two_ranks_measure_what_one_process_measures(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, on_ranks, tmp_path, 1)
    both = run_ranks(2, on_ranks, tmp_path, 2)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, rel=1e-4)
