"""Shards under a real Trainer: epochs that end, and checkpoints in the middle of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from datamodules import Shards, VideosWithImages
from datamodules.fields import ClassLabel, Images

from shard_files import write_numbered


class Reader(pl.LightningModule):
    """Trains one number and notes what it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[str]]] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch["key"]))
        self.dtypes.add(batch["sample"].dtype)
        if pictures := batch.get("images"):
            assert len(pictures["sample"]) == 2 * len(batch["sample"])
            self.seen.append((self.current_epoch, pictures["key"]))
            self.dtypes.add(pictures["sample"].dtype)
        return (self.weight - batch["sample"].mean()) ** 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    def __init__(self, update: int, path: Path) -> None:
        self.update, self.path = update, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.update:
            trainer.save_checkpoint(self.path)


def data_of(folder: Path, remainder: str, workers: int, **options: Any) -> Shards:
    given = {"sample": Images(channels=1), "batch_size": 4, **options}
    return Shards(
        str(folder / "shards"),
        str(folder / "shards"),
        conditions={"class_labels": ClassLabel()},
        num_workers=workers,
        remainder=remainder,  # type: ignore[arg-type]
        **given,
    )


def fit(data: pl.LightningDataModule, **options: Any) -> Reader:
    module = Reader()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 3),
        max_steps=options.pop("max_steps", -1),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=options.pop("callbacks", []),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(module, data, **options)
    return module


@pytest.mark.parametrize(("remainder", "batches"), [("share", 5), ("drop", 4)])
@pytest.mark.parametrize(("saved_at", "workers"), [(1, 0), (3, 2), (4, 0), (5, 0), (7, 0)])
def test_epochs_end_and_resume_where_they_were(
    tmp_path: Path, remainder: str, batches: int, saved_at: int, workers: int
) -> None:
    write_numbered(tmp_path / "shards", [7, 6, 5])
    checkpoint = tmp_path / "middle.ckpt"
    data = data_of(tmp_path, remainder, workers)
    whole = fit(data, callbacks=[SaveAt(saved_at, checkpoint)])
    assert [epoch for epoch, _ in whole.seen] == [e for e in range(3) for _ in range(batches)]
    for epoch in range(3):
        keys = [key for e, part in whole.seen for key in part if e == epoch]
        assert len(keys) == len(set(keys)) == (18 if remainder == "share" else 16)
    resumed = fit(data_of(tmp_path, remainder, workers), ckpt_path=checkpoint)
    assert resumed.seen == whole.seen[saved_at:]
    assert resumed.dtypes == {torch.float32}


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_and_their_pictures_resume_where_they_were(tmp_path: Path, workers: int) -> None:
    write_numbered(tmp_path / "shards", [7, 6, 5])
    checkpoint = tmp_path / "middle.ckpt"

    def data() -> VideosWithImages:
        clips = Images(channels=1, as_video=True)
        return VideosWithImages(
            data_of(tmp_path, "carry", workers, sample=clips),
            data_of(tmp_path, "carry", workers, batch_size=8, seed=1),
        )

    options = {"max_epochs": -1, "max_steps": 11}
    whole = fit(data(), callbacks=[SaveAt(6, checkpoint)], **options)
    assert len(whole.seen) == 2 * 11
    resumed = fit(data(), ckpt_path=checkpoint, **options)
    assert resumed.seen == whole.seen[2 * 6 :]
    assert resumed.dtypes == {torch.float32}
