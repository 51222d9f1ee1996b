"""What residual gates become while they train, and what the streams that they gate carry."""

from __future__ import annotations

import csv
import io
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from callbacks.charts import bar_charts
from callbacks.console import say
from callbacks.disk import explained_when_full
from callbacks.logged import log_picture
from callbacks.pictures import save_picture
from callbacks.together import on_first_rank
from fewstep.errors import FewstepError
from fewstep.networks.gates import gate_parameters, gate_tensors, gate_values
from fewstep.networks.gates.streams import (
    StreamNorms,
    gate_places,
    is_compiled,
    watched_streams,
)

FOLDER, FILE_NAME = "gates", "values.csv"
GATES = ("alpha", "spread", "beta", "rho", "skip")
STREAMS = ("stream", "ratio", "unit", "cosine", "gradient")
COLUMNS = ("update", "role", "gate", *GATES, *STREAMS)
LOGGED = ("alpha", "beta", "rho", "skip", "ratio", "unit", "cosine", "gradient")
TITLES = {
    "alpha": "alpha",
    "beta": "|beta|",
    "rho": "rho",
    "skip": "factor of the skips",
    "stream": "stream",
    "ratio": "what a block adds / its stream",
    "unit": "what a gated branch or block adds / its block's stream",
    "cosine": "cosine of what it adds and the stream",
    "gradient": "gradient of the loss by a block's stream",
}
Row = dict[str, Any]


class GateReport(Callback):
    """Writes down every so often what each trained gate is, from the network's input to its output.

    One line a gate goes to ``gates/values.csv`` in the run's folder, a chart of the latest to
    ``gates/``, and both to the run's loggers (``gates/alpha/...`` and so on):

    - ``alpha``, ``spread``, ``beta``, ``rho``, ``skip``: the gate after the update, see
      :class:`fewstep.networks.gates.GateValue`;
    - ``stream``: the root mean square of what the gate's block is given;
    - ``ratio``: that of what the block adds, modulation and gates included, relative to it. Blocks
      with the smallest could go first, see :func:`fewstep.networks.gates.surgery.prune`. It is the
      same of all gates of a block's stream;
    - ``unit``: what the gate's own branch, or block, adds, ``|alpha F + beta|``, relative to the
      same stream. Of blocks with several branches it is what the gate gives, before the block's own
      modulation: where that multiplies branches, as adaLN does, this compares a gate with itself
      over time rather than with ``ratio``. Elsewhere it is what is added;
    - ``cosine``: of the angle between that and the stream, each as one vector: near 1 or -1 it
      scales the stream, about 0 it turns it;
    - ``gradient``: that of the loss's gradient by what the block is given. It is about the same at
      all depths where a network is as sensitive to its first blocks as to its last;
      :class:`~callbacks.Sensitivity` logs how far it is not.

    What is of streams is of the first rank's first micro-batch of the update, and empty for blocks
    that have no stream of their own, such as those that change the size. Of networks with compiled
    blocks it is always empty, as these do not let anyone look inside. Between reports
    nothing is measured and nothing waits.

    Args:
        every_n_updates: student updates between reports; the last update has one too.
        pictures: whether to draw charts.

    Raises:
        FewstepError: for a number of updates below 1.
    """

    def __init__(self, every_n_updates: int = 500, pictures: bool = True) -> None:
        if every_n_updates < 1:
            raise FewstepError(
                f"callbacks.GateReport needs every_n_updates of at least 1, not {every_n_updates}."
            )
        self.every_n_updates = every_n_updates
        self.pictures = pictures
        self._roles: dict[str, nn.Module] = {}
        self._watch = ExitStack()
        self._streams: dict[str, list[StreamNorms]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the gates, and drops lines of updates that a resumed run will do again."""
        self._roles = {
            name: role
            for name, role in pl_module.named_children()
            if any(parameter.requires_grad for parameter in gate_parameters(role))
        }
        if not self._roles:
            say(trainer, "callbacks.GateReport has nothing to report: no gates are trained.")
            return
        if any(map(is_compiled, self._roles.values())):
            say(trainer, "callbacks.GateReport: blocks are compiled, so their streams stay unseen.")
        path, updates = Path(trainer.default_root_dir) / FOLDER / FILE_NAME, trainer.global_step

        def start() -> None:
            rows = read_gate_report(path.parent.parent) if path.exists() else []
            _write(path, [row for row in rows if row["update"] <= updates])

        on_first_rank(trainer, start)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Begins to watch the streams, on the first rank, if this update is reported."""
        if self._roles and self._due(trainer, trainer.global_step + 1) and trainer.is_global_zero:
            self._streams = {
                name: self._watch.enter_context(watched_streams(role, with_gradient=True))
                for name, role in self._roles.items()
                if not is_compiled(role)
            }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Reports; a collective, as sharded gates are gathered."""
        self._watch.close()
        if not self._roles or not self._due(trainer, trainer.global_step):
            return
        rows = [
            row
            for name, role in self._roles.items()
            for row in _rows(trainer.global_step, name, role, self._streams.get(name, []))
        ]
        self._streams = {}
        on_first_rank(trainer, lambda: self._report(trainer, rows))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Watches no longer."""
        self._watch.close()

    def _due(self, trainer: pl.Trainer, update: int) -> bool:
        return update % self.every_n_updates == 0 or update == trainer.max_steps

    def _report(self, trainer: pl.Trainer, rows: list[Row]) -> None:
        folder, update = Path(trainer.default_root_dir) / FOLDER, trainer.global_step
        with explained_when_full(folder), (folder / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(_lines(rows))
        scalars = {
            f"gates/{kind}/{row['role']}.{row['gate']}": row[kind]
            for row in rows
            for kind in LOGGED
            if row[kind] is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=update)
        for name in self._roles if self.pictures else ():
            own = [row for row in rows if row["role"] == name]
            series = {title: [_shown(row[kind]) for row in own] for kind, title in TITLES.items()}
            image = bar_charts({t: v for t, v in series.items() if any(x is not None for x in v)})
            save_picture(image, folder / f"{update:08d}_{name}.png")
            for logger in trainer.loggers:
                log_picture(logger, f"gates/{name}", image, update)


def read_gate_report(folder: Path) -> list[Row]:
    """The lines of a run's report, oldest first; numbers that are missing are None.

    So are those that were not written down yet when the run began.

    Raises:
        FewstepError: if the file is missing or damaged.
    """
    path = folder / FOLDER / FILE_NAME
    numbers = (*GATES, *STREAMS)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {"update": int(row["update"]), "role": row["role"], "gate": row["gate"]}
                | {name: float(row[name]) if row.get(name) else None for name in numbers}
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FewstepError(
            f"'{path}' cannot be read ({error}). Delete it; nothing else depends on it."
        ) from error


def _rows(update: int, name: str, role: nn.Module, streams: list[StreamNorms]) -> list[Row]:
    """A line a gate, in the network's order; a collective, if the role is sharded."""
    values = {value.name: value for value in gate_values(gate_tensors(role))}
    seen = {(norms.block, norms.side): norms for norms in streams}
    rows = []
    for gate, place in gate_places(role).items():
        row: Row = {"update": update, "role": name, "gate": gate}
        row |= {kind: getattr(values[gate], kind) for kind in GATES}
        norms = None if place is None else seen.get(place)
        row |= dict.fromkeys(STREAMS) if norms is None else _of_stream(norms, gate)
        rows.append(row)
    return rows


def _of_stream(norms: StreamNorms, gate: str) -> Row:
    unit = gate.rpartition(".")[0]
    return {
        "stream": norms.stream.item(),
        "ratio": norms.ratio,
        "unit": norms.ratio_of(unit),
        "cosine": norms.cosine_of(unit),
        "gradient": None if norms.gradient is None else norms.gradient.item(),
    }


def _shown(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _lines(rows: list[Row]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, rows: list[Row]) -> None:
    with explained_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(",".join(COLUMNS) + "\n" + _lines(rows), encoding="utf-8")
        partial.replace(path)
