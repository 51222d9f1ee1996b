"""Statistics of reference sets, kept on disk so that each is computed once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep.metrics.base import Metric, Statistics

logger = logging.getLogger(__name__)


class ReferenceStore:
    """A folder of statistics, each under the hash of what it is: metric, features and data set.

    Args:
        folder: ``references`` below ``$FEWSTEP_CACHE`` or ``~/.cache/fewstep`` by default.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        cache = Path(os.environ.get("FEWSTEP_CACHE", "~/.cache/fewstep"))
        self.folder = Path(folder or cache / "references").expanduser()

    def path(self, metric: Metric, reference: dict[str, Any]) -> Path:
        """The file for a metric's statistics of a reference set.

        Args:
            metric: its protocol, which has the hash of its features, is part of the name.
            reference: which data set, in plain values.
        """
        what = json.dumps([metric.protocol(), reference], sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.safetensors"

    def load(self, metric: Metric, reference: dict[str, Any]) -> Statistics | None:
        """The stored statistics; None if there are none, or none that can be read."""
        path = self.path(metric, reference)
        if not path.is_file():
            return None
        statistics = metric.statistics()
        try:
            statistics.restore(load_file(path))
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning(
                "The stored statistics '%s' cannot be read (%s); computing them anew.", path, error
            )
            return None
        return statistics

    def save(self, metric: Metric, reference: dict[str, Any], statistics: Statistics) -> None:
        """Stores statistics; the file appears under its name when it is whole.

        Where the folder cannot be written, nothing is lost but time: it warns and goes on.
        """
        path = self.path(metric, reference)
        about = {"metric": metric.protocol(), "reference": reference}
        partial = path.with_suffix(f".partial-{os.getpid()}")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in statistics.tensors().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"about": json.dumps(about, default=str)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            logger.warning(
                "Statistics of the reference set cannot be kept as '%s' (%s); the next run "
                "computes them anew. Make room there, or name another folder: the Evaluation "
                "callback's `references`, or FEWSTEP_CACHE.",
                path,
                error,
            )
