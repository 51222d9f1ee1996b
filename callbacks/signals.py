"""What this process does about signals while a trainer runs, instead of Lightning's answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class Signals:
    """Answers SIGUSR1 and SIGTERM in place of Lightning, until :meth:`hand_back`.

    Lightning's handler of SIGTERM waits for other ranks at whatever point the signal found them,
    and with SLURM its handler of SIGUSR1 saves there: ranks meet in different collectives and hang.
    Besides, it asks all ranks about signals at the start of every batch, for which each must wait
    until its device has caught up.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._replaced: list[tuple[Any, str]] = []

    def refuse_requeueing(self, trainer: pl.Trainer) -> None:
        """Leaves it to the batch script to put a SLURM job back into the queue."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def answer(self, trainer: pl.Trainer, handler: Handler) -> None:
        """Has signals call a function, at whatever line of the program they come."""
        self._keep_out(trainer)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, handler)

    def end_at_once(self, trainer: pl.Trainer) -> None:
        """Lets signals end this process at once, and the ranks that it has started with it.

        For commands that have nothing to save. Where other programs start the ranks, they also
        signal them, and signals do what they did before the trainer: by default, they end a rank
        whatever it waits for.
        """
        self._keep_out(trainer)
        launcher = trainer.strategy.launcher
        if launcher is None:
            return

        def pass_on(number: int, frame: FrameType | None) -> None:
            launcher.kill(number)
            self.hand_back()
            signal.raise_signal(number)

        self.answer(trainer, pass_on)

    def stop_asking_each_batch(self, trainer: pl.Trainer) -> None:
        """Stops Lightning's question to all ranks at the start of a batch; another takes its place.

        It costs a copy to the device, a broadcast and a wait for the device.
        """
        self._replace(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")

    def hand_back(self) -> None:
        """Leaves signals to whatever answered them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for owner, name in self._replaced:
            vars(owner).pop(name, None)
        self._before, self._replaced = {}, []

    def _keep_out(self, trainer: pl.Trainer) -> None:
        """Keeps Lightning from registering handlers of its own."""
        self._replace(getattr(trainer, "_signal_connector", None), "register_signal_handlers")

    def _replace(self, owner: Any, name: str) -> None:
        """Makes one of Lightning's own methods do nothing, in the versions that have it."""
        if hasattr(owner, name):
            setattr(owner, name, _nothing)
            self._replaced.append((owner, name))


def _nothing() -> None:
    """In place of what is not to happen."""
