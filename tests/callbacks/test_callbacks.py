"""Callbacks on a small ring run: what they write, when, and that it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import Checkpoints, Samples, Throughput
from callbacks.samples import picture
from datamodules import RingData
from lightning_modules import ConsistencyDistillation

from rings import Run, quiet_trainer, ring_teacher


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


def test_waiting_for_data_is_told_from_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    callbacks: list[pl.Callback] = [Throughput(every_n_updates=4)]
    trainer = quiet_trainer(tmp_path, callbacks, 4, logger=Logger())
    trainer.fit(ConsistencyDistillation(ring_teacher, 50), RingData(batch_size=64))
    assert logged["throughput/data_wait_share"] > 0.5
