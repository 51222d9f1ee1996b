"""Shards that tests make, and a trainer that says only where and when."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules import Shards
from datamodules.fields import ClassLabel, Images

Members = dict[str, bytes]


class FakeTrainer:
    """What a datamodule asks of a trainer."""

    def __init__(self, global_rank: int = 0, world_size: int = 1, global_step: int = 0) -> None:
        self.global_rank, self.world_size = global_rank, world_size
        self.global_step = global_step


def encoded(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def png(value: int, height: int = 8, width: int = 8) -> bytes:
    return encoded(np.full((height, width), value, dtype=np.uint8))


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_numbered(folder: Path, sizes: list[int]) -> Path:
    """Shards whose records are images of their own number, with keys like ``2-0007``."""
    for shard, size in enumerate(sizes):
        members: Members = {}
        for number in range(size):
            members[f"{shard}-{number:04d}.png"] = png(number % 256)
            members[f"{shard}-{number:04d}.cls"] = str(number % 10).encode()
        write_tar(folder / f"part-{shard:03d}.tar", members)
    return folder


def shards(folder: Path, trainer: FakeTrainer | None = None, **options: Any) -> Shards:
    """A datamodule over the images in a folder."""
    options = {
        "shards": str(folder),
        "val_shards": str(folder),
        "batch_size": 5,
        "sample": Images(channels=1),
        "conditions": {"class_labels": ClassLabel()},
        **options,
    }
    data = Shards(**options)
    data.trainer = trainer or FakeTrainer()  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    return data


def read(data: Shards, which: str = "val", batches: int | None = None) -> list[Any]:
    """Batches as the trainer would hand them over."""
    loader = data.val_dataloader() if which == "val" else data.train_dataloader()
    found = []
    for batch in loader:
        ready = data.on_before_batch_transfer(batch, 0)
        found.append(data.on_after_batch_transfer(ready, 0))
        if batches is not None and len(found) == batches:
            break
    return found


def keys(batches: list[Any]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]
