"""A callback that writes down which samples the optimiser consumed, update by update."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class KeyLog(Callback):
    """Appends ``update rank key key ...`` to a file that survives being killed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        with Path(self.path).open("a") as file:
            print(trainer.global_step, trainer.global_rank, *batch["key"], file=file)
            file.flush()
            os.fsync(file.fileno())


def read_log(path: Path) -> dict[tuple[int, int], list[str]]:
    """Keys by (update, rank); a line of a resumed run replaces that of the killed one."""
    found = {}
    for line in path.read_text().splitlines():
        update, rank, *keys = line.split()
        found[int(update), int(rank)] = keys
    return found
