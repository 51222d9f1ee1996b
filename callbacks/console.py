"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class Progress(TQDMProgressBar):
    """A progress bar that counts student updates; in a log file it prints few lines."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Chooses how often to refresh."""
        super().on_train_start(trainer, pl_module)
        if not sys.stderr.isatty():
            self._refresh_rate = max(20, trainer.max_steps // 5)

    def init_validation_tqdm(self) -> Tqdm:
        """Validation is short here and needs no bar of its own."""
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Names the bar after the experiment: an endless stream has no epochs to count."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(getattr(trainer, "run_name", "training"))

    def get_metrics(
        self, *args: Any, **kwargs: Any
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Leaves out the logger's version."""
        items = super().get_metrics(*args, **kwargs)
        items.pop("v_num", None)
        return items


def say(trainer: pl.Trainer, message: str) -> None:
    """Prints a line once, on the first rank, above the progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is not None and trainer.training:
        bar.print(message)
    else:
        print(message, flush=True)
