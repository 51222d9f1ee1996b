"""What a report is made of: runs as their folders tell them."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from callbacks.alarms import FILE_NAME as ALARMS_FILE
from callbacks.alarms import read_alarms
from callbacks.results import FILE_NAME, Measurement, read_results
from fewstep.contracts import Alarm
from fewstep.errors import FewstepError
from scripts.loggers import FILE_NAME as METRICS_FILE
from scripts.loggers import read_metrics

Curves = dict[str, list[tuple[int, float]]]

TEACHER_METHOD = "DiffusionTraining"
CONFIG_FILE = "config.yaml"
PICTURE_NAME = re.compile(r"(\d+)_(.+)_(\d+)_steps\.png")
CLIPS = (".webp", ".gif")
MOST_PROMPTS = 200


@dataclass(frozen=True)
class Picture:
    """A sample picture.

    Attributes:
        clip: the animation of which the picture is a still, where samples are videos.
    """

    path: Path
    role: str
    num_steps: int
    updates: int
    clip: Path | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """All that is known of one run.

    Attributes:
        label: the experiment, with the version where an experiment has several.
        position: its place among the report's runs, from 0.
        training: what training has cost; any entry may be missing.
        config: the resolved configuration, flat: dotted key to plain value.
        pictures: by role, step count and updates.
        prompts: of the pictures' samples, in reading order.
        alarms: raised and ended in training, oldest first (:func:`callbacks.alarms.read_alarms`).
    """

    folder: Path
    name: str
    version: str
    label: str
    method: str
    updates: int | None
    training: dict[str, Any]
    environment: dict[str, Any]
    measurements: list[Measurement]
    curves: Curves
    config: dict[str, Any]
    pictures: list[Picture]
    prompts: list[str]
    alarms: list[dict[str, Any]] = field(default_factory=list)
    position: int = 0

    @property
    def seed(self) -> Any:
        """Of training; None where the configuration does not tell."""
        return self.config.get("seed_everything")

    @property
    def device_hours(self) -> float | None:
        """Training cost in device hours, if the run recorded it."""
        hours = number(self.training.get("device_hours"))
        if hours is not None:
            return hours
        seconds = number(self.training.get("seconds"))
        devices = number(self.training.get("devices"))
        return None if seconds is None or devices is None else seconds * devices / 3600


@dataclass
class Material:
    """The runs of a report, and what is missing or damaged in them."""

    runs: list[Run]
    notes: list[str] = field(default_factory=list)


def number(value: Any) -> float | None:
    """A number out of a file, or None for anything else."""
    return float(value) if isinstance(value, int | float) else None


def collect(folders: Sequence[Path]) -> Material:
    """Reads every run below some folders, teachers first; what cannot be read is noted.

    Raises:
        FewstepError: if there is no run, or none that can be read.
    """
    material = Material([])
    damage: FewstepError | None = None
    found = find_runs(folders)
    for folder in found:
        try:
            material.runs.append(_read_run(folder, material.notes))
        except FewstepError as error:
            damage = damage or error
            material.notes.append(f"Left out a run. {error}")
    if damage is not None and not material.runs:
        raise damage
    if not material.runs:
        raise FewstepError(
            f"There is no {FILE_NAME} below {', '.join(repr(str(f)) for f in folders)}. A run "
            "writes it when training ends; `fewstep evaluate -c EXPERIMENT` writes it for any "
            "checkpoint."
        )
    runs = sorted(material.runs, key=lambda run: run.method != TEACHER_METHOD)
    material.runs = _labelled(runs)
    return material


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Folders with a ``results.json``, each once, in the order given and then by name.

    Raises:
        FewstepError: for a folder that is not there.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FewstepError(
                f"There is no folder '{folder}'. Give run folders, or a folder that holds some, "
                "such as runs/."
            )
        for path in sorted((p.parent for p in folder.rglob(FILE_NAME)), key=natural):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def natural(path: Path | str) -> list[tuple[int, str]]:
    """A sort key in which version_10 follows version_9."""
    pieces = re.findall(r"\d+|\D+", str(path))
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]


def _labelled(runs: list[Run]) -> list[Run]:
    """Adds the version, and if need be the folder, to labels that several runs share."""
    for suffix in ("version", "folder"):
        shared = Counter(run.label for run in runs)
        runs = [
            replace(run, label=f"{run.label} · {getattr(run, suffix)}")
            if shared[run.label] > 1
            else run
            for run in runs
        ]
    return [replace(run, position=i) for i, run in enumerate(runs)]


def _read_run(folder: Path, notes: list[str]) -> Run:
    path = folder / FILE_NAME
    results = read_results(path)
    name = str(results.get("run", folder.parent.name))
    version = str(results.get("version", folder.name))
    where = f"{name} ({folder})"
    updates = number(results.get("student_updates"))
    return Run(
        folder=folder,
        name=name,
        version=version,
        label=name,
        method=str(results.get("method", "unknown method")),
        updates=None if updates is None else int(updates),
        training=_dict(results.get("training")),
        environment=_dict(results.get("environment")),
        measurements=_measurements(path, results["measurements"], where, notes),
        curves=_read_curves(folder, where, notes),
        config=_read_config(folder, where, notes),
        pictures=_find_pictures(folder, where, notes),
        prompts=_read_prompts(folder),
        alarms=_read_alarms(folder, where, notes),
    )


def _dict(value: Any) -> dict[str, Any]:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


def _measurements(
    path: Path, entries: list[Any], where: str, notes: list[str]
) -> list[Measurement]:
    """Checked measurements.

    Raises:
        FewstepError: if one lacks what a measurement must have.
    """
    if not entries:
        notes.append(f"{where} holds no measurement.")
    try:
        found = [_measurement(entry) for entry in entries]
        return [
            replace(
                m,
                metric=str(m.metric),
                value=float(m.value),
                num_steps=int(m.num_steps),
                network_evaluations=int(m.network_evaluations),
                role=str(m.role),
                protocol=dict(m.protocol),
            )
            for m in found
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FewstepError(
            f"'{path}' holds a measurement that cannot be read ({error!r}). Delete the file and "
            "run `fewstep evaluate` again."
        ) from error


def _measurement(entry: dict[str, Any]) -> Measurement:
    """Fields that a file of an earlier version lacks have their defaults."""
    needed = [f for f in fields(Measurement) if f.name in entry or f.default is MISSING]
    return Measurement(**{f.name: entry[f.name] for f in needed})


def _read_curves(folder: Path, where: str, notes: list[str]) -> Curves:
    try:
        curves = read_metrics(folder)
    except (OSError, ValueError, csv.Error) as error:
        notes.append(f"{where}: {METRICS_FILE} cannot be read ({error}); no training curves.")
        return {}
    if not curves:
        notes.append(f"{where} has no {METRICS_FILE}, or an empty one; no training curves.")
    return curves


def _read_config(folder: Path, where: str, notes: list[str]) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        notes.append(f"{where} has no {CONFIG_FILE}; its settings are not compared.")
        return {}
    try:
        return flatten(dict(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{where}: {CONFIG_FILE} cannot be read ({error}).")
        return {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys; entries of a list of classes go by their class's name."""
    if isinstance(value, dict) and (value or not prefix):
        return _joined((f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items())
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        names = [str(v.get("class_path", i)).rsplit(".", 1)[-1] for i, v in enumerate(value)]
        if len(set(names)) < len(names):
            names = [f"{name} {i}" for i, name in enumerate(names)]
        return _joined((f"{prefix}[{n}]", v) for n, v in zip(names, value, strict=True))
    return {prefix: value}


def _joined(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {key: v for name, nested in entries for key, v in flatten(nested, name).items()}


def _find_pictures(folder: Path, where: str, notes: list[str]) -> list[Picture]:
    """Every picture, with its clip if it has one."""
    found = []
    for path in (folder / "samples").glob("*.png"):
        match = PICTURE_NAME.fullmatch(path.name)
        if match is not None:
            clips = [c for end in CLIPS if (c := path.with_suffix(end)).exists()]
            clip = clips[0] if clips else None
            found.append(Picture(path, match[2], int(match[3]), int(match[1]), clip))
    if not found:
        notes.append(f"{where} has no sample pictures; `fewstep sample` draws them.")
    return sorted(found, key=lambda p: (p.role, p.num_steps, p.updates))


def _read_prompts(folder: Path) -> list[str]:
    path = folder / "samples" / "prompts.txt"
    try:
        return path.read_text(encoding="utf-8").splitlines()[:MOST_PROMPTS]
    except (OSError, ValueError):
        return []


def _read_alarms(folder: Path, where: str, notes: list[str]) -> list[dict[str, Any]]:
    needed = {"update", "mean", "state", *Alarm._fields}
    try:
        found = read_alarms(folder)
    except FewstepError as error:
        notes.append(f"{where}: {error}")
        return []
    if not all(isinstance(line, dict) and needed <= line.keys() for line in found):
        notes.append(f"{where}: {ALARMS_FILE} has lines that are no alarms; none are shown.")
        return []
    return found
