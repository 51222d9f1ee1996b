"""Checkpoints at stated student updates, written so that a kill leaves a usable one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Checkpoints(Callback):
    """Saves ``checkpoints/update_00001000.ckpt`` and points ``last.ckpt`` at the newest.

    A checkpoint is a file, or, of a sharded run, a folder. It appears under its name only when it
    is whole, and ``last.ckpt`` moves only after that.

    Args:
        every_n_updates: student updates between checkpoints; the last update is always saved.
        keep: how many to keep; null keeps all.
    """

    def __init__(self, every_n_updates: int = 1000, keep: int | None = 2) -> None:
        self.every_n_updates = every_n_updates
        self.keep = keep

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Saves every so many student updates, and at the last."""
        updates = trainer.global_step
        last = updates >= trainer.max_steps > 0
        if last or (self.every_n_updates and updates % self.every_n_updates == 0):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Saves now; a collective."""
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"update_{trainer.global_step:08d}.ckpt"
        partial, replaced = path.with_suffix(".partial"), path.with_suffix(".replaced")
        if trainer.is_global_zero:
            _remove(partial)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if path.is_dir():  # of an earlier course of this run; a folder cannot be replaced
                _remove(replaced)
                path.rename(replaced)
            partial.replace(path)
            link = folder / "last.ckpt.new"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(folder / "last.ckpt")
            self._prune(folder)
        trainer.strategy.barrier()

    def _prune(self, folder: Path) -> None:
        for leftover in [*folder.glob("*.partial"), *folder.glob("*.replaced")]:
            _remove(leftover)
        if self.keep is not None:
            for path in sorted(folder.glob("update_*.ckpt"))[: -max(1, self.keep)]:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
