"""How fast training runs, what it waits for and what it has cost."""

from __future__ import annotations

import time
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from fewstep.contracts import Batch


class Throughput(Callback):
    """Logs samples a second, the share of time spent waiting for data, and peak memory.

    Keep it last in the list of callbacks: the time from the end of its turn to the next batch is
    what it calls waiting for data, and the time other callbacks take is then no part of it. It only
    reads the host's clock, so over an interval it is exact while within one step it is not: the
    device works ahead.

    Args:
        every_n_updates: student updates between log lines.
    """

    def __init__(self, every_n_updates: int = 50) -> None:
        self.every_n_updates = every_n_updates
        self._seconds = 0.0
        self._samples = 0
        self._waited = self._worked = 0.0
        self._interval_samples = 0
        self._mark: float | None = None
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Training time so far, over all resumptions, the step under way included."""
        under_way = 0.0 if self._started is None else time.monotonic() - self._started
        return self._seconds + self._waited + self._worked + under_way

    @property
    def samples(self) -> int:
        """Samples trained on so far, over all resumptions."""
        return self._samples + self._interval_samples

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Ends the wait for data."""
        self._started = time.monotonic()
        self._interval_samples += len(batch["sample"]) * trainer.world_size
        if self._mark is not None:
            self._waited += self._started - self._mark

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Adds up and, every so often, logs."""
        self._worked += time.monotonic() - (self._started or time.monotonic())
        self._started = None
        if (
            trainer.global_step % self.every_n_updates == 0
            or trainer.global_step == trainer.max_steps
        ):
            self._log(trainer, pl_module)
        self._mark = time.monotonic()

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        elapsed = self._waited + self._worked
        values = {
            "throughput/samples_per_second": self._interval_samples / elapsed,
            "throughput/data_wait_share": self._waited / elapsed,
        }
        if torch.cuda.is_available():
            values["throughput/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._seconds, self._samples = self.seconds, self.samples
        self._waited = self._worked = 0.0
        self._interval_samples = 0
        cast(Any, pl_module).training_cost = self.cost(trainer, pl_module)

    def cost(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What training has cost so far, over all resumptions."""
        counts = cast(Any, pl_module).evaluations()
        per_sample = sum(count.forward + 2 * count.backward for count in counts.values())
        return {
            "seconds": round(self.seconds, 3),
            "devices": trainer.world_size,
            "device_hours": self.seconds * trainer.world_size / 3600,
            "samples": self.samples,
            # A backward pass costs about two forward passes.
            "forward_equivalents_per_sample": per_sample,
        }

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not waiting for data."""
        if self._mark is not None:
            self._waited += time.monotonic() - self._mark

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the clock up again after validation."""
        if self._mark is not None:
            self._mark = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the cost to the checkpoint's metadata, where evaluations find it."""
        checkpoint.setdefault("fewstep", {})["training"] = self.cost(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Cost so far, for resumption."""
        return {"seconds": self.seconds, "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues an earlier run's count."""
        self._seconds, self._samples = state_dict["seconds"], state_dict["samples"]
