"""Saving and stopping in time when the machine is about to be taken away."""

from __future__ import annotations

from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import Checkpoints
from callbacks.console import say
from callbacks.signals import Signals
from fewstep.errors import FewstepError

EXIT_STATUS = 75
FLAG_NAME = "PREEMPT"


class Preempted(SystemExit):
    """Ends the process; the first rank's status, 75, tells a batch script to requeue its job."""


class Preemption(Callback):
    """Saves a checkpoint and stops as soon as the run is asked to, on all ranks after one update.

    Asked by a file ``PREEMPT`` in the run's folder, which the first rank looks for, or by SIGUSR1
    or SIGTERM at any rank. Ranks agree by one number on the CPU that travels while the networks
    compute. Only the first rank leaves with status 75, the others with 0: launchers
    that watch their children then have no cause to kill a rank that is still leaving.

    After the last update a run still measures; what takes long then, such as an evaluation, calls
    :func:`leave_if_requested` at moments of its own choice.

    Lightning's own handlers of these signals never get to work, since they can hang. A signal that
    comes before training counts at its first update; one that comes while a command only validates
    or measures ends it at once, as there is nothing to save. If a run has several of these
    callbacks, the first does the work.

    Args:
        every_n_updates: student updates between looks.
    """

    def __init__(self, every_n_updates: int = 1) -> None:
        if every_n_updates < 1:
            raise FewstepError(
                f"every_n_updates of Preemption is {every_n_updates}; give 1 or more."
            )
        self.every_n_updates = every_n_updates
        self._signalled = self._watching = self._updated = False
        self._signals = Signals()
        self._group: dist.ProcessGroup | None = None
        self._answer: torch.Tensor | None = None
        self._travelling: dist.Work | None = None

    # ------------------------------------------------------------------ watching

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes over the signals, before Lightning would."""
        self._signals.refuse_requeueing(trainer)
        if not self._leads(trainer):
            return
        self._signalled = False
        if stage == "fit":
            self._signals.answer(trainer, self._note)
        else:
            self._signals.end_at_once(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to watch; a collective."""
        if not self._leads(trainer):
            return
        self._watching, self._updated = True, False
        if trainer.world_size > 1:
            # A group of its own, so that its messages never mix with those of the training step.
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        # Again, in case another version of Lightning has registered its own meanwhile.
        self._signals.answer(trainer, self._note)
        self._signals.stop_asking_each_batch(trainer)

    def _leads(self, trainer: pl.Trainer) -> bool:
        everyone = (c for c in cast(Any, trainer).callbacks if isinstance(c, Preemption))
        return next(everyone, None) is self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sends the question on its way; it is answered when the update is done."""
        self._updated = True
        if not self._watching or (trainer.global_step + 1) % self.every_n_updates:
            return
        self._answer = torch.tensor([int(self.requested(trainer))])
        if self._group is not None:
            self._travelling = dist.all_reduce(
                self._answer, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Stops if any rank was asked to, unless training is done anyway; the same on all ranks."""
        if self._answer is None:
            return
        if self._travelling is not None:
            self._travelling.wait()
        asked = bool(self._answer.item())
        self._answer = self._travelling = None
        done = trainer.global_step >= trainer.max_steps > 0
        if asked and not done:
            self.stop(trainer)

    def requested(self, trainer: pl.Trainer) -> bool:
        """Whether this rank has been asked to stop; others may not have been."""
        flagged = trainer.is_global_zero and flag_of(trainer).exists()
        return self._watching and (flagged or self._signalled)

    def agreed(self, trainer: pl.Trainer) -> bool:
        """Whether any rank has been asked to stop; the same on all, and a collective."""
        answer = torch.tensor([int(self.requested(trainer))])
        if self._group is not None:
            dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._group)
        return bool(answer.item())

    # ------------------------------------------------------------------ stopping

    def stop(self, trainer: pl.Trainer) -> None:
        """Saves and leaves; a collective.

        Raises:
            Preempted: always.
        """
        saving = [c for c in cast(Any, trainer).callbacks if isinstance(c, Checkpoints)]
        # A resumed run that was finished has changed nothing.
        if self._updated and not any(c.saved_at == trainer.global_step for c in saving):
            (saving[0] if saving else Checkpoints()).save(trainer)
        self._lower_flag(trainer)
        say(
            trainer,
            f"Asked to stop: saved update {trainer.global_step}. "
            "The same command with --ckpt_path last goes on.",
        )
        trainer.strategy.barrier()  # nobody leaves while the first rank still writes
        raise Preempted(EXIT_STATUS if trainer.is_global_zero else 0)

    def _lower_flag(self, trainer: pl.Trainer) -> None:
        """Removes the file, so that the next start is not stopped by it."""
        if trainer.is_global_zero:
            flag_of(trainer).unlink(missing_ok=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A request that came after all work is out of date."""
        if self._watching:
            self._lower_flag(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hands the signals back."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Hands the signals back."""
        self._close()

    def _close(self) -> None:
        self._signals.hand_back()
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group, self._watching = None, False
        self._answer = self._travelling = None


def requested(trainer: pl.Trainer) -> bool:
    """Whether this rank of a run was asked to stop; others may not have been, so do not act."""
    watcher = _watcher(trainer)
    return watcher is not None and watcher.requested(trainer)


def leave_if_requested(trainer: pl.Trainer) -> None:
    """Saves and leaves with status 75, if any rank was asked to stop; a collective.

    For work of a training run that takes long outside its updates; where no run is watched, as in
    ``fewstep evaluate``, it does nothing.

    Raises:
        Preempted: on all ranks, if any was asked to stop.
    """
    watcher = _watcher(trainer)
    if watcher is not None and watcher.agreed(trainer):
        watcher.stop(trainer)


def _watcher(trainer: pl.Trainer) -> Preemption | None:
    """The callback that does the work, while it does."""
    callbacks = cast(Any, trainer).callbacks
    return next((c for c in callbacks if isinstance(c, Preemption) and c._watching), None)


def flag_of(trainer: pl.Trainer) -> Path:
    """The file that asks a run to stop."""
    return Path(trainer.default_root_dir) / FLAG_NAME
