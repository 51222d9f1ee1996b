"""A metrics file that survives resumption: long-format CSV, only ever appended to."""

from __future__ import annotations

import csv
import io
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from callbacks.disk import explained_when_full

FILE_NAME = "metrics.csv"
COLUMNS = ("step", "time", "name", "value")


class MetricsCSV(Logger):
    """Appends one row a value to ``metrics.csv``: step, Unix time, name, value.

    Lightning's CSVLogger deletes the earlier rows when a run is resumed in the same folder. Rows a
    killed run wrote past its last checkpoint stay too; readers keep the latest row of a step.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    def name(self) -> str:
        """The experiment's folder."""
        return self.folder.parent.name

    @property
    def version(self) -> str:
        """The run's folder."""
        return self.folder.name

    @property
    def log_dir(self) -> str:
        """Where the file lies."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing to do: the resolved config is saved beside the metrics."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Appends the values of one step."""
        path = self.folder / FILE_NAME
        now = f"{time.time():.3f}"
        rows = io.StringIO(newline="")
        writer = csv.writer(rows)
        if not path.exists():
            writer.writerow(COLUMNS)
        for name, value in metrics.items():
            number = value.item() if isinstance(value, Tensor) else value
            writer.writerow([step, now, name, repr(float(number))])
        with explained_when_full(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            _append(path, rows.getvalue())


def _append(path: Path, text: str) -> None:
    """Adds to a file; if that fails midway, the file is as it was."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="") as file:
            file.write(text)
    except OSError:
        os.truncate(path, before)
        raise


def read_metrics(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Reads ``metrics.csv`` as curves: name to (step, value) pairs in the order of steps.

    A line cut short by a kill is passed over; of several values for a step the latest counts.
    """
    path = Path(folder) / FILE_NAME
    curves: dict[str, dict[int, float]] = {}
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        for row in csv.reader(file):
            try:
                step, _, name, value = row
                curves.setdefault(name, {})[int(step)] = float(value)
            except ValueError:
                continue
    return {name: sorted(points.items()) for name, points in curves.items()}
