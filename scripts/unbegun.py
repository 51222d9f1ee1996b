"""Run folders of runs that failed before their first update, which hold nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl

# What a run writes before it begins.
CONFIG = "config.yaml"
BOARD = "tensorboard"


@contextmanager
def discarded_unless_begun(trainer: pl.Trainer, run: Path) -> Iterator[None]:
    """Takes a run's folder away again if what is done within fails before the first update.

    Only a folder that was not there before, that the first rank's process made and that holds
    nothing but the configuration; a run without a teacher leaves no ``version_N`` then.
    """
    new = not run.exists()
    try:
        yield
    except Exception:
        if new and trainer.is_global_zero and trainer.global_step == 0 and holds_nothing(run):
            shutil.rmtree(run, ignore_errors=True)
        raise


def holds_nothing(run: Path) -> bool:
    """Whether a run's folder holds no file but its configuration and the board's first events."""
    return all(
        path.relative_to(run).as_posix() == CONFIG
        or (path.parent == run / BOARD and path.name.startswith("events."))
        for path in run.rglob("*")
        if not path.is_dir() or path.is_symlink()
    )
