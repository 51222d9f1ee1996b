"""``results.json``: measured numbers with everything needed to compare them."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.disk import explained_when_full
from fewstep import __version__
from fewstep.errors import FewstepError
from fewstep.metrics.base import Better

FILE_NAME = "results.json"
PACKAGES = ("torch", "lightning", "diffusers", "torchmetrics", "webdataset")


@dataclass(frozen=True)
class Measurement:
    """One number: a metric of one role at one step count and seed.

    Attributes:
        metric: its name, which says over which features.
        network_evaluations: evaluations a sample, guidance included.
        guidance_scale: of classifier-free guidance while sampling; 1 is off.
        protocol: what must be equal for two numbers to be comparable.
        better: which way.
    """

    metric: str
    value: float
    num_steps: int
    network_evaluations: int
    guidance_scale: float
    role: str
    num_samples: int
    seed: int
    protocol: dict[str, Any]
    better: Better = "lower"

    def key(self) -> tuple[Any, ...]:
        """What makes a later measurement replace an earlier one."""
        return (self.metric, self.num_steps, self.role, self.num_samples, self.seed)


def read_results(path: Path) -> dict[str, Any]:
    """Reads a ``results.json``.

    Raises:
        FewstepError: if it is damaged.
    """
    try:
        content = json.loads(path.read_text())
        return dict(content) | {"measurements": list(content["measurements"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FewstepError(
            f"'{path}' is not a results file of fewstep ({error}). Delete it and run "
            "`fewstep evaluate` again."
        ) from error


def write_results(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    found: list[Measurement],
    cost: dict[str, float],
) -> None:
    """Writes ``results.json`` into the run's folder; repeated measurements replace their like.

    Measurements of other weights (another number of student updates) are dropped, not mixed in.

    Args:
        trainer, pl_module: whose run, and method.
        found: the measurements.
        cost: seconds the evaluations took, and their share of the run.
    """
    if not trainer.is_global_zero:
        return
    folder = Path(trainer.default_root_dir)
    # Outside training the checkpoint says how long it was trained; in training the trainer does.
    loaded = getattr(pl_module, "loaded_metadata", None) if trainer.state.fn != "fit" else None
    record: dict[str, Any] = dict(loaded or {})
    updates = record.get("student_updates", trainer.global_step)
    measurements = {m.key(): asdict(m) for m in found}
    path = folder / FILE_NAME
    if path.exists():
        earlier = read_results(path)
        if earlier.get("student_updates") == updates:
            for entry in earlier["measurements"]:
                measurements.setdefault(Measurement(**entry).key(), entry)
    content = {
        "format": 1,
        "run": getattr(trainer, "run_name", folder.parent.name),
        "version": folder.name,
        "method": type(pl_module).__name__,
        "student_updates": updates,
        "training": record.get("training", getattr(pl_module, "training_cost", {})),
        "evaluation": cost,
        "environment": environment(),
        "measurements": sorted(
            measurements.values(), key=lambda m: (m["metric"], m["role"], m["num_steps"], m["seed"])
        ),
    }
    with explained_when_full(path):
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)


def environment() -> dict[str, str]:
    """Versions and device that produced a number."""
    found = {"fewstep": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.is_available()
    found["device"] = torch.cuda.get_device_name() if gpu else f"cpu ({platform.machine()})"
    return found
