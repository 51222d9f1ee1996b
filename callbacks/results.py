"""``results.json``: measured numbers with everything needed to compare them."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.disk import explained_when_full
from fewstep import __version__
from fewstep.contracts import SteeredSampler
from fewstep.errors import FewstepError
from fewstep.metrics.base import Better, Metric

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
        cost: what a sample of training-free guidance took: evaluations and gradients of the
            denoiser, evaluations of the energy, seconds.
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
    cost: dict[str, float] | None = None

    def key(self) -> tuple[Any, ...]:
        """What makes a later measurement replace an earlier one."""
        cell = (self.role, self.num_steps, self.guidance_scale, self.seed)
        return (self.metric, *cell, self.num_samples)


def check_names(metrics: Sequence[Metric]) -> None:
    """Refuses metrics whose values could not be told apart.

    Raises:
        FewstepError: names them, and the value.
    """
    owners: dict[str, Metric] = {}
    for metric in metrics:
        for name in metric.better:
            other = owners.setdefault(name, metric)
            if other is not metric:
                raise FewstepError(
                    f"{type(other).__name__} and {type(metric).__name__} of the Evaluation "
                    f"callback's `metrics` both give values called '{name}', of which results.json "
                    "would keep one. Take one of the two out, or measure it in an evaluation of "
                    "its own, with another --run.dir."
                )


def read_results(path: Path) -> dict[str, Any]:
    """Reads a ``results.json``.

    Raises:
        FewstepError: if it is damaged.
    """
    try:
        content = json.loads(path.read_text())
        return dict(content) | {"measurements": list(content["measurements"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FewstepError:
    return FewstepError(
        f"'{path}' is not a results file of this version of fewstep ({error}). Delete it and run "
        "`fewstep evaluate` again."
    )


def write_results(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    found: list[Measurement],
    cost: dict[str, float],
) -> None:
    """Writes ``results.json`` into the run's folder; repeated measurements replace their like.

    Measurements from another source are dropped, not mixed in: of other weights (another number of
    student updates, or a checkpoint of another run), another pipeline or other finished samples.

    Args:
        trainer, pl_module: whose run, and method.
        found: the measurements.
        cost: seconds the evaluations took, and their share of the run.

    Raises:
        FewstepError: if there is a results file that cannot be read, as of another version.
    """
    if not trainer.is_global_zero:
        return
    folder = Path(trainer.default_root_dir)
    # Outside training the checkpoint says how long it was trained; in training the trainer does.
    loaded = getattr(pl_module, "loaded_metadata", None) if trainer.state.fn != "fit" else None
    record: dict[str, Any] = dict(loaded or {})
    updates = record.get("student_updates", trainer.global_step)
    source = source_of(trainer, pl_module, updates)
    path = folder / FILE_NAME
    earlier = _earlier(path, source) if path.exists() else []
    measurements = {m.key(): asdict(m) for m in [*earlier, *found]}
    content = {
        "format": 1,
        "run": getattr(trainer, "run_name", folder.parent.name),
        "version": folder.name,
        "method": type(pl_module).__name__,
        "student_updates": updates,
        "source": source,
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


def source_of(trainer: pl.Trainer, pl_module: pl.LightningModule, updates: int) -> dict[str, Any]:
    """Whose samples were measured, in plain values."""
    stated = getattr(pl_module, "sample_source", None)  # what stands in for a method
    if stated is not None:
        return dict(stated())
    source: dict[str, Any] = {"student_updates": updates}
    if isinstance(pl_module, SteeredSampler) and (steering := pl_module.steering_record()):
        source["steering"] = steering
    drawn: dict[str, Any] = getattr(pl_module, "sampling_record", dict)()
    if drawn:
        source["sampling"] = drawn
    loaded = getattr(trainer, "ckpt_path", None) if trainer.state.fn != "fit" else None
    home = Path(trainer.default_root_dir).resolve()
    if loaded is not None and home not in Path(loaded).resolve().parents:
        source["checkpoint"] = str(Path(loaded).resolve())  # of another run than this folder's
    return source


def measured_of(path: Path, source: dict[str, Any]) -> list[dict[str, Any]]:
    """What a results file has measured of a source, as plain values.

    Raises:
        FewstepError: if it is damaged.
    """
    content = read_results(path)
    # Files without a source are older than it; they tell students apart by their updates alone.
    if content.get("source", {"student_updates": content.get("student_updates")}) != source:
        return []
    return list(content["measurements"])


def _earlier(path: Path, source: dict[str, Any]) -> list[Measurement]:
    """The same as measurements."""
    try:
        return [Measurement(**entry) for entry in measured_of(path, source)]
    except TypeError as error:
        raise _unreadable(path, error) from error


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
