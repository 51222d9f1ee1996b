"""Tells in words when a method's own signs of trouble show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.console import say
from callbacks.disk import explained_when_full
from callbacks.together import on_first_rank
from fewstep.contracts import Alarm, Watched
from fewstep.errors import FewstepError

FILE_NAME = "alarms.jsonl"


class Alarms(Callback):
    """Warns when a value that a method logs leaves the range the method gives it.

    What to watch comes from the method (:class:`fewstep.contracts.Watched`); with others there is
    nothing to do. Values are averaged on the device, over updates and ranks, and read only every so
    many updates. A warning is told once and again only after the value was back in its range. It
    also goes to the loggers (``alarms/...``: 1 where it begins, 0 where it ends) and into the run's
    ``alarms.jsonl``, one line each:

    - ``update``: when;
    - ``mean``: the value's, over the updates since the last look;
    - ``state``: ``raised`` or ``ended``;
    - ``value``, ``below``, ``above``, ``advice``: the method's :class:`fewstep.contracts.Alarm`.

    Args:
        every_n_updates: updates between looks.
        patience: looks in a row that must agree before an alarm is raised or ends.
    """

    def __init__(self, every_n_updates: int = 50, patience: int = 2) -> None:
        if every_n_updates < 1 or patience < 1:
            raise FewstepError(
                "callbacks.Alarms needs every_n_updates and patience of at least 1, not "
                f"{every_n_updates} and {patience}."
            )
        self.every_n_updates = every_n_updates
        self.patience = patience
        self.record: list[dict[str, Any]] = []
        self._alarms: list[Alarm] = []
        self._raised: dict[str, bool] = {}
        self._against: dict[str, int] = {}  # looks in a row that disagree with what is told
        self._sum: Tensor | None = None
        self._count = 0

    # ------------------------------------------------------------------ means, on the device

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Asks the method what to watch."""
        self._alarms = list(pl_module.alarms()) if isinstance(pl_module, Watched) else []
        self._sum, self._count = None, 0
        if self._alarms:
            self._write(trainer)  # without what came after the checkpoint resumed from

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Adds an update's values; looks every so many updates."""
        if not self._alarms:
            return
        values = self._values(trainer, pl_module)
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1
        if trainer.global_step % self.every_n_updates == 0:
            self._look(trainer)

    def _values(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        """All watched values; NaN for those not logged, so that ranks always have equally many."""
        logged = trainer.callback_metrics
        missing = torch.full((), torch.nan, device=pl_module.device)
        found = [logged.get(alarm.value, missing) for alarm in self._alarms]
        return torch.stack([value.detach().float().to(pl_module.device) for value in found])

    # ------------------------------------------------------------------ looks, on the host

    def _look(self, trainer: pl.Trainer) -> None:
        """Reads the means, which is where the host waits for the device; a collective."""
        assert self._sum is not None
        means = cast(Tensor, trainer.strategy.reduce(self._sum / self._count, reduce_op="mean"))
        self._sum, self._count = None, 0
        changes = [
            self._change(alarm, mean, trainer.global_step)
            for alarm, mean in zip(self._alarms, means.tolist(), strict=True)
            if self._turns(alarm, mean)
        ]
        if not changes:
            return
        self.record += changes
        self._write(trainer)
        for change in changes:
            say(trainer, sentence(change))
            name = change["value"].removeprefix("train/")
            for logger in trainer.loggers:
                logger.log_metrics(
                    {f"alarms/{name}": float(change["state"] == "raised")},
                    step=trainer.global_step,
                )

    def _turns(self, alarm: Alarm, mean: float) -> bool:
        """Counts a look, and says whether an alarm is raised or ends by it."""
        if math.isnan(mean):  # missing, or no number, which callbacks.FiniteLosses tells
            return False
        raised = self._raised.get(_key(alarm), False)
        against = self._against.get(_key(alarm), 0) + 1 if _beyond(alarm, mean) != raised else 0
        turns = against >= self.patience
        self._against[_key(alarm)] = 0 if turns else against
        self._raised[_key(alarm)] = raised != turns
        return turns

    def _change(self, alarm: Alarm, mean: float, update: int) -> dict[str, Any]:
        state = "raised" if self._raised[_key(alarm)] else "ended"
        return {"update": update, "mean": mean, "state": state, **alarm._asdict()}

    def _write(self, trainer: pl.Trainer) -> None:
        """Writes all lines anew, on the first rank; a collective."""
        path = Path(trainer.default_root_dir) / FILE_NAME

        def write() -> None:
            if not self.record and not path.exists():
                return
            with explained_when_full(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in self.record))
                partial.replace(path)

        on_first_rank(trainer, write)

    # ------------------------------------------------------------------ resumption

    def state_dict(self) -> dict[str, Any]:
        """What was told so far, and what is about to be."""
        return {"record": self.record, "raised": self._raised, "against": self._against}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where an earlier run was."""
        self.record = list(state_dict["record"])
        self._raised = dict(state_dict["raised"])
        self._against = dict(state_dict["against"])


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``alarms.jsonl``, oldest first; none if there was no alarm.

    Raises:
        FewstepError: if the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise FewstepError(
            f"'{path}' cannot be read ({error}). Delete it; nothing else depends on it."
        ) from error


def sentence(change: dict[str, Any]) -> str:
    """A line of ``alarms.jsonl`` in words."""
    mean = f"{change['value']} was {change['mean']:.3g} on average at update {change['update']:,}"
    if change["state"] == "ended":
        return f"{mean}, back in its range."
    low = change["below"] is not None and change["mean"] < change["below"]
    side = "below" if low else "above"
    return f"Alarm: {mean}, {side} {change[side]:.3g}. {change['advice']}".rstrip()


def _key(alarm: Alarm) -> str:
    """Names an alarm, of which a value may have several."""
    return json.dumps([alarm.value, alarm.below, alarm.above])


def _beyond(alarm: Alarm, mean: float) -> bool:
    too_low = alarm.below is not None and mean < alarm.below
    return too_low or (alarm.above is not None and mean > alarm.above)
