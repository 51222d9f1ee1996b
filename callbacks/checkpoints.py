"""Checkpoints at stated student updates, written so that a kill leaves a usable one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.distributed.checkpoint.api import CheckpointException

from callbacks.disk import first_reason, full_disk, full_reason


class Checkpoints(Callback):
    """Saves ``checkpoints/update_00001000.ckpt`` and points ``last.ckpt`` at the newest.

    A checkpoint is a file, or, of a sharded run, a folder. It appears under its name only when it
    is whole, and ``last.ckpt`` moves only after that.

    Args:
        every_n_updates: student updates between checkpoints; the last update is always saved.
        keep: how many to keep; null keeps all.

    Attributes:
        saved_at: the student update of the checkpoint saved last by this process, the same on all
            ranks.
    """

    def __init__(self, every_n_updates: int = 1000, keep: int | None = 2) -> None:
        self.every_n_updates = every_n_updates
        self.keep = keep
        self.saved_at: int | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Saves every so many student updates, and at the last."""
        updates = trainer.global_step
        last = updates >= trainer.max_steps > 0
        if last or (self.every_n_updates and updates % self.every_n_updates == 0):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Saves now; a collective.

        Raises:
            FewstepError: on all ranks, if the disk is full at any; earlier checkpoints stay.
        """
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"update_{trainer.global_step:08d}.ckpt"
        partial = path.with_suffix(".partial")
        if trainer.is_global_zero:
            _remove(partial)
        trainer.strategy.barrier()
        self._agree(trainer, path, self._write(trainer, partial))
        self._agree(trainer, path, self._publish(path) if trainer.is_global_zero else None)
        self.saved_at = trainer.global_step

    def _write(self, trainer: pl.Trainer, partial: Path) -> BaseException | None:
        """Writes; an error that means a full disk is returned, so that all ranks can be told."""
        try:
            trainer.save_checkpoint(partial, weights_only=False)
        except (Exception, CheckpointException) as error:
            if full_reason(error) is None:
                raise
            trainer.strategy.barrier()  # where ranks that wrote nothing wait in save_checkpoint
            return error
        return None

    def _publish(self, path: Path) -> BaseException | None:
        """Gives a whole checkpoint its name; an error that means a full disk is returned."""
        folder, replaced = path.parent, path.with_suffix(".replaced")
        try:
            if path.is_dir():  # of an earlier course of this run; a folder cannot be replaced
                _remove(replaced)
                path.rename(replaced)
            path.with_suffix(".partial").replace(path)
            link = folder / "last.ckpt.new"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(folder / "last.ckpt")
            self._prune(folder)
        except OSError as error:
            if full_reason(error) is None:
                raise
            return error
        return None

    def _agree(self, trainer: pl.Trainer, path: Path, failure: BaseException | None) -> None:
        """Ends the run on all ranks, if the disk was full at any; a collective."""
        reason = first_reason(full_reason(failure), trainer.world_size)
        if reason is None:
            return
        needed = _size_of_newest(path.parent)
        if trainer.is_global_zero:
            _remove(path.with_suffix(".partial"))
        trainer.strategy.barrier()
        raise full_disk(path, reason, needed) from failure

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


def _size_of_newest(folder: Path) -> int | None:
    """Bytes of the newest checkpoint, from which the size of the next can be told."""
    found = sorted(folder.glob("update_*.ckpt"))
    if not found:
        return None
    files = [found[-1]] if found[-1].is_file() else found[-1].rglob("*")
    return sum(file.stat().st_size for file in files)
