"""How many processor cores a rank needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jsonargparse import Namespace

from scripts.slurm.options import Options

# The training process, and its thread that copies batches to where devices reach them.
BESIDE_LOADING = 2


def with_cores(options: Options, data: Iterable[Any]) -> Options:
    """The options with a number of cores a rank, if they have none: enough for its processes.

    SLURM would give a rank one core, which its training and loading processes had to share.

    Args:
        data: the data configurations of the runs that the job trains.
    """
    if options.cpus_per_gpu is not None:
        return options
    needed = max(map(loading_processes, data), default=0) + BESIDE_LOADING
    return replace(options, cpus_per_gpu=needed)


def loading_processes(data: Any) -> int:
    """All ``num_workers`` in a configuration of data, since those of data within data load too."""
    if isinstance(data, Namespace):
        data = data.as_dict()
    if isinstance(data, Mapping):
        return sum(
            int(value or 0) if key == "num_workers" else loading_processes(value)
            for key, value in data.items()
        )
    return sum(map(loading_processes, data)) if isinstance(data, list) else 0
