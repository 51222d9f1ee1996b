"""A run whose losses are no longer numbers stops, and keeps the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.console import say
from fewstep.errors import FewstepError

PREFIX = "train/"
NEVER = 2**62  # beyond any update
EXIT_STATUS = 4  # of a run that stops for such losses


class DivergedError(FewstepError):
    """Losses or gradients are no numbers any more."""

    status = EXIT_STATUS


class FiniteLosses(Callback):
    """Stops a run once a training loss or gradient norm is NaN or infinite.

    Each update leaves a flag on the device, and the host looks at them only every so many updates
    and before each checkpoint: a step waits for nobody, and no checkpoint is written from weights
    that nobody has looked at. Methods neutralise such an update on the device, so that weights,
    averages and optimiser states stay finite meanwhile.

    Args:
        max_skipped: such updates to tolerate in a run, all resumptions together, before it stops.
            They count as updates, their samples as seen.
        every_n_updates: updates between looks.

    Raises:
        DivergedError: on all ranks, naming the update, what was not finite and how to go on.
    """

    def __init__(self, max_skipped: int = 0, every_n_updates: int = 50) -> None:
        if max_skipped < 0 or every_n_updates < 1:
            raise FewstepError(
                "callbacks.FiniteLosses needs max_skipped of at least 0 and every_n_updates of at "
                f"least 1, not {max_skipped} and {every_n_updates}."
            )
        self.max_skipped = max_skipped
        self.every_n_updates = every_n_updates
        self.skipped = 0
        self._names: tuple[str, ...] = ()
        self._flags: Tensor | None = None

    # ------------------------------------------------------------------ flags, on the device

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Notes on the device whether all was finite; looks every so many updates."""
        watched = self._watched(trainer)
        if tuple(watched) != self._names:
            self._look(trainer, pl_module)
            self._names = tuple(watched)
        if watched:
            self._note(trainer.global_step, list(watched.values()))
        if trainer.global_step % self.every_n_updates == 0:
            self._look(trainer, pl_module)

    def _watched(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        return {
            name.removeprefix(PREFIX): value.detach()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(PREFIX)
        }

    def _note(self, update: int, values: list[Tensor]) -> None:
        """Adds one update to the flags: their number, the first one, and what was wrong there."""
        wrong = torch.stack([value.float() for value in values]).isfinite().logical_not()
        if self._flags is None:
            self._flags = wrong.new_zeros(2 + len(values), dtype=torch.long)
        count, first, what = self._flags[0], self._flags[1], self._flags[2:]
        spoilt = wrong.any()
        fresh = spoilt & (first == 0)
        what.copy_(torch.where(fresh, wrong, what))
        first.copy_(torch.where(fresh, update, first))
        count.add_(spoilt)

    # ------------------------------------------------------------------ looks, on the host

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks before anything is written."""
        self._look(trainer, pl_module)
        # Lightning has asked for states already.
        checkpoint.setdefault("callbacks", {})[self.state_key] = self.state_dict()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the last updates."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the flags, which is where the host waits for the device; a collective."""
        if self._flags is None:
            return
        # The maximum over ranks must be the earliest of those updates that are there, not the last.
        self._flags[1] = torch.where(self._flags[1] > 0, NEVER - self._flags[1], 0)
        flags = cast(Tensor, trainer.strategy.reduce(self._flags, reduce_op="max"))
        count, left, *what = flags.tolist()
        self._flags = None
        if not count:
            return
        first = NEVER - left
        self.skipped += count
        named = [name for name, wrong in zip(self._names, what, strict=True) if wrong]
        if self.skipped > self.max_skipped:
            raise DivergedError(self._message(trainer, pl_module, first, named))
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_updates": self.skipped}, step=trainer.global_step)
        say(
            trainer,
            f"{_these(named)} not finite at update {first:,}; the update was skipped "
            f"({self.skipped} of at most {self.max_skipped} so far).",
        )

    def _message(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, first: int, named: list[str]
    ) -> str:
        hints = ["a lower learning rate (model.init_args.optimizer.init_args.lr)"]
        if getattr(pl_module, "gradient_clip", 1.0) is None:
            hints.append("clipping (model.init_args.gradient_clip: 1.0)")
        else:
            hints.append("a smaller model.init_args.gradient_clip")
        if str(trainer.precision).startswith("16"):
            hints.append("trainer.precision: bf16-mixed instead of fp16")
        over = f" ({self.skipped} such updates, of at most {self.max_skipped})"
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = (
            f"The newest checkpoint, {last.resolve().name}, is from before it and usable: "
            "--ckpt_path last goes on from there."
            if last.exists()
            else "There is no checkpoint yet, so begin anew."
        )
        return (
            f"Training stopped: {_these(named)} not finite at update {first:,}"
            f"{over if self.max_skipped else ''}.\n{kept}\n"
            f"The same settings would lead there again; try {', '.join(hints[:-1])} or "
            f"{hints[-1]}. callbacks.FiniteLosses with a max_skipped leaves out that many updates."
        )

    # ------------------------------------------------------------------ resumption

    def state_dict(self) -> dict[str, Any]:
        """How many updates were skipped so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues an earlier run's count."""
        self.skipped = state_dict["skipped"]


def _these(named: list[str]) -> str:
    if len(named) == 1:
        return f"{named[0]} was"
    return f"{', '.join(named[:-1])} and {named[-1]} were"
