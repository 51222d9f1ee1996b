"""TensorBoard with the run's settings beside its metrics, and charts that compare step counts."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import custom_scalars, hparams

FOLDER = "tensorboard"
COMPARED = ("seed_everything", "model.", "data.", "trainer.max_steps", "trainer.precision")
"""Beginnings of the settings that are shown: what a run does, not how it is organised."""

EVALUATED = re.compile(r"eval/([^/]+)/([^/]+)/(\d+)_steps")


class TensorBoard(TensorBoardLogger):
    """Writes hyper-parameters and a layout of charts once, with the first evaluation.

    Lightning would write hyper-parameters at the start, with a metric of its own that is never
    measured, and TensorBoard's ``add_hparams`` into a run of its own. Here they go into the run's
    own event file and name the metrics that were evaluated, whose last values TensorBoard shows.

    Args:
        folder: the run's folder; events go to ``tensorboard/`` in it.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder), name="", version=FOLDER)
        self._settings: dict[str, Any] = {}
        self._names: set[str] = set()
        self._written = False

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps the settings that say what a run does until there is a metric to set them beside.

        Args:
            params: settings by dotted key.
            args, kwargs: what else Lightning passes; not used.
        """
        given = params if isinstance(params, dict) else vars(params)
        self._settings |= shown_settings(given)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs scalars, and before the first evaluation what it belongs to."""
        self._names.update(metrics)
        if not self._written and any(EVALUATED.fullmatch(name) for name in metrics):
            self._describe()
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the run."""
        if self._names and self._settings and status == "success":
            if not self._written:
                self._describe()
            *_, ended = hparams(self._settings, {})
            self.experiment._get_file_writer().add_summary(ended)
        super().finalize(status)

    def _describe(self) -> None:
        self._written = True
        writer = self.experiment._get_file_writer()
        evaluated = sorted(name for name in self._names if EVALUATED.fullmatch(name))
        if self._settings:
            metrics = evaluated or sorted(self._names & {"train/loss", "val/loss"})
            experiment, started, _ = hparams(self._settings, dict.fromkeys(metrics, 0.0))
            writer.add_summary(experiment)
            writer.add_summary(started)
        if evaluated:
            writer.add_summary(custom_scalars(chart_layout(evaluated)))


def shown_settings(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings that say what a run does, as values TensorBoard takes; nulls are left out."""
    return {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in settings.items()
        if key.startswith(COMPARED) and value is not None
    }


def chart_layout(names: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Charts of TensorBoard's custom scalars: all step counts of a metric, and each on its own.

    With several runs open, every chart has a line for each of them, so the first compares step
    counts and the others compare methods.

    Args:
        names: of scalars, ``eval/METRIC/ROLE/N_steps``; others are passed over.
    """
    counts: dict[str, set[int]] = {}
    for name in names:
        if found := EVALUATED.fullmatch(name):
            counts.setdefault(found[1], set()).add(int(found[3]))
    return {
        metric: {"all step counts": ["Multiline", [f"eval/{re.escape(metric)}/.*_steps"]]}
        | {
            f"{n} step{'s' * (n != 1)}": ["Multiline", [f"eval/{re.escape(metric)}/.*/{n}_steps"]]
            for n in sorted(found_counts)
        }
        for metric, found_counts in counts.items()
    }
