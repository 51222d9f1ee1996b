"""Callbacks on a small ring run: what they write, when, and that it is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import Checkpoints, Evaluation, Samples, Throughput
from callbacks.results import read_results
from callbacks.samples import picture
from datamodules import RingData
from fewstep.diffusion import AnalyticDenoiser, Denoiser, VPSchedule, ode_sample
from fewstep.errors import FewstepError
from fewstep.metrics import SlicedWasserstein
from fewstep.networks import RingMixture
from fewstep.seeding import torch_generator
from lightning_modules import ConsistencyDistillation

Run = Callable[..., pl.Trainer]


def ring_teacher() -> Denoiser:
    schedule = VPSchedule()
    return Denoiser(RingMixture(schedule, 5), schedule, "epsilon")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def fit(callbacks: list[pl.Callback], updates: int = 4, **trainer: Any) -> pl.Trainer:
        made = pl.Trainer(
            max_steps=updates,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=tmp_path / "ring" / "version_0",
            callbacks=callbacks,
            **trainer,
        )
        module = ConsistencyDistillation(ring_teacher, 50)
        made.fit(module, RingData(batch_size=64, reference_samples=512), weights_only=True)
        return made

    return fit


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
    reference = list(data.reference_batches())
    labels = torch.cat([b["cond"]["class_labels"] for b in reference])[:128]
    noise = torch.randn(128, 2, generator=torch_generator(0, "evaluation-noise", 0))
    teacher = ring_teacher()
    exact = AnalyticDenoiser(teacher.backbone.mixture, teacher.schedule)  # type: ignore[arg-type]
    samples = ode_sample(
        exact, noise.double(), {"class_labels": labels}, teacher.schedule.spaced_times(4)
    )
    metric = SlicedWasserstein()
    metric.set_reference([b["sample"] for b in reference])
    accumulator = metric.accumulate()
    accumulator.update(samples)
    assert entry["value"] == pytest.approx(accumulator.compute(), rel=1e-3)


def test_the_batch_size_of_the_evaluation_keeps_samples_and_their_number(run: Run) -> None:
    trainer = run([evaluation()], updates=1)
    callback = evaluation(batch_size=100)
    sizes = [
        len(x)
        for x in callback._generate(trainer, trainer.lightning_module, "student", 1, 0, 250)
        if callback._cond is None
    ]
    assert sizes == [100, 100, 50]


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
    callback = evaluation(every_n_updates=2, num_samples_in_training=50)
    seen: list[tuple[int, int]] = []

    def record(trainer: pl.Trainer, module: Any, num_samples: int, seeds: Any) -> list[Any]:
        seen.append((trainer.global_step, num_samples))
        return []

    monkeypatch.setattr(callback, "run", record)
    monkeypatch.setattr("callbacks.evaluation.write_results", lambda *args: None)
    run([callback], updates=6)
    assert seen == [(2, 50), (4, 50), (6, 300)]


def test_checkpoints_keep_the_newest_and_leave_no_partial_files(run: Run) -> None:
    trainer = run([Checkpoints(every_n_updates=1, keep=2)], updates=5)
    folder = Path(trainer.default_root_dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "last.ckpt",
        "update_00000004.ckpt",
        "update_00000005.ckpt",
    ]
    assert (folder / "last.ckpt").resolve().name == "update_00000005.ckpt"


def test_a_failure_while_saving_keeps_the_last_whole_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run([Checkpoints(every_n_updates=2)], updates=2)
    folder = Path(trainer.default_root_dir) / "checkpoints"

    def dies(path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "save_checkpoint", dies)
    with pytest.raises(OSError, match="No space"):
        Checkpoints().save(trainer)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


def test_pictures_use_the_same_noise_at_every_update(run: Run) -> None:
    trainer = run(
        [Samples(num_steps=[1], count=64, every_n_updates=1, roles=["teacher"])], updates=3
    )
    folder = Path(trainer.default_root_dir) / "samples"
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"{n:08d}_teacher_1_steps.png" for n in (1, 2, 3)]
    images = [np.array(Image.open(folder / name)) for name in names]
    assert all(np.array_equal(images[0], image) for image in images[1:])


def test_a_grid_shows_white_as_white() -> None:
    images = torch.full((4, 1, 8, 8), -1.0)
    images[1] = 1.0
    grid = picture(images, columns=2)
    assert grid.shape == (3, 19, 19)
    assert int(grid[0, 4, 4]) == 0
    assert int(grid[0, 4, 14]) == 255


def test_throughput_counts_samples_and_time_over_resumptions(run: Run) -> None:
    first = Throughput(every_n_updates=2)
    trainer = run([first], updates=5)
    cost = first.cost(trainer, trainer.lightning_module)
    assert cost["samples"] == 5 * 64
    assert 0 < cost["seconds"] < 60
    second = Throughput()
    second.load_state_dict(first.state_dict())
    trainer = run([second], updates=1)
    assert second.cost(trainer, trainer.lightning_module)["samples"] == 6 * 64
    # teacher 1, student 2 forward and 1 backward (which counts as 2)
    assert cost["forward_equivalents_per_sample"] == 5


def test_waiting_for_data_is_told_from_working(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    logged: dict[str, float] = {}

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.update({k: v for k, v in metrics.items() if k.startswith("throughput")})

    real = RingData.batch

    def slow(self: RingData, stream: str, number: int, rank: int = 0) -> Any:
        if stream == "mixture-train":
            time.sleep(0.2)
        return real(self, stream, number, rank)

    monkeypatch.setattr(RingData, "batch", slow)
    callback = Throughput(every_n_updates=4)
    trainer = run([callback], updates=1)
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=Logger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Throughput(every_n_updates=4)],
    )
    trainer.fit(ConsistencyDistillation(ring_teacher, 50), RingData(batch_size=64))
    assert logged["throughput/data_wait_share"] > 0.5
