"""How sensitive a network is to its first blocks, next to its last."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from callbacks.console import say
from callbacks.together import on_first_rank
from fewstep.errors import FewstepError
from fewstep.networks.gates.sensitivity import sensitivity
from fewstep.networks.gates.streams import StreamNorms, is_compiled, watched_streams


class Sensitivity(Callback):
    """Logs what depth does to a network's residual stream, gated or not.

    - ``sensitivity/amplification``: the loss's gradient by what the first block is given, relative
      to that by what the last one gives. It is 1 where a network is as sensitive to its first
      blocks as to its last, and grows with the depth of plain pre-LN networks;
    - ``sensitivity/growth``: the stream behind the last block, relative to that before the first.

    Both are ratios of root mean squares (:class:`fewstep.networks.gates.sensitivity.Sensitivity`)
    in the first rank's first micro-batch of an update, which is watched while it trains; nothing is
    computed for them. Networks with compiled blocks cannot be watched.

    Args:
        every_n_updates: student updates between measurements; the last update has one too. 0 is the
            last one alone.

    Raises:
        FewstepError: for a negative number of updates.
    """

    def __init__(self, every_n_updates: int = 0) -> None:
        if every_n_updates < 0:
            raise FewstepError(
                f"callbacks.Sensitivity takes every_n_updates from 0 on, not {every_n_updates}."
            )
        self.every_n_updates = every_n_updates
        self._watch = ExitStack()
        self._streams: list[StreamNorms] = []
        self._student: nn.Module | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the student."""
        student = pl_module.get_submodule("student")
        if is_compiled(student):
            say(trainer, "callbacks.Sensitivity: blocks are compiled, so their stream is unseen.")
            return
        self._student = student

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Begins to watch, on the first rank, if this update is measured."""
        due = self._student is not None and self._due(trainer, trainer.global_step + 1)
        if due and trainer.is_global_zero:
            assert self._student is not None
            watched = watched_streams(self._student, with_gradient=True)
            self._streams = self._watch.enter_context(watched)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Logs; a collective."""
        self._watch.close()
        if self._student is not None and self._due(trainer, trainer.global_step):
            on_first_rank(trainer, lambda: self._log(trainer))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Watches no longer."""
        self._watch.close()

    def _due(self, trainer: pl.Trainer, update: int) -> bool:
        every = self.every_n_updates
        return update == trainer.max_steps or (every > 0 and update % every == 0)

    def _log(self, trainer: pl.Trainer) -> None:
        found = end_to_end(self._streams)
        self._streams = []
        for logger in trainer.loggers if found else ():
            logger.log_metrics(found, step=trainer.global_step)


def end_to_end(streams: list[StreamNorms]) -> dict[str, float]:
    """The two ratios of the sample's stream; nothing where no block was seen."""
    if not any(norms.side == "sample" for norms in streams):
        return {}
    found = sensitivity(streams)
    pairs = {"amplification": found.amplification, "growth": found.growth}
    return {f"sensitivity/{name}": ratio for name, ratio in pairs.items() if ratio is not None}
