"""Runs that differ in nothing but their seed, taken together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.report.data import TEACHER_METHOD, Run

OWN_TO_A_RUN = ("run.", "ckpt_path")
"""Settings that say where a run lies, not what it does."""

SEEDS = ("seed_everything", "data.init_args.seed")
TEACHER_PATH = "model.init_args.teacher"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with one and the same configuration but for the seed; a single run is a group too.

    Attributes:
        position: its place among the report's groups, from 0; it decides on the group's looks.
    """

    label: str
    runs: tuple[Run, ...]
    position: int = 0

    @property
    def first(self) -> Run:
        """The run that stands for all where one must."""
        return self.runs[0]

    @property
    def method(self) -> str:
        """What all runs were trained by."""
        return self.first.method

    @property
    def is_teacher(self) -> bool:
        """Whether these are what students are measured against."""
        return self.method == TEACHER_METHOD

    @property
    def versions(self) -> set[str]:
        """The versions of its runs."""
        return {run.version for run in self.runs}

    def shown(self, run: Run) -> str:
        """A run's name within the group: its seed, and its version if that does not tell it."""
        return f"seed {run.seed}" if run.seed is not None else run.version


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs.

    Runs without a configuration, and repetitions with the same seed, stay on their own.
    """
    keys = _Keys(runs)
    found: dict[tuple[str, int], list[Run]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for run in runs:
        key = keys.of(run)
        place = (key, seen[key, str(run.seed)])
        seen[key, str(run.seed)] += 1
        found.setdefault(place, []).append(run)
    groups = [Group(_label(members, runs), tuple(members)) for members in found.values()]
    return [replace(group, position=i) for i, group in enumerate(groups)]


def _label(members: Sequence[Run], runs: Sequence[Run]) -> str:
    """The experiment, with versions where it has several groups of runs."""
    name = members[0].name
    if len(members) == 1:
        return members[0].label
    if len(members) == sum(run.name == name for run in runs):
        return name
    return f"{name} · {', '.join(run.version for run in members)}"


class _Keys:
    """What must be equal for two runs to differ in their seed only."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._known: dict[Path, str] = {}

    def of(self, run: Run) -> str:
        """The run's settings as one string."""
        if run.folder not in self._known:
            self._known[run.folder] = str(run.folder)  # should a run name itself as its teacher
            self._known[run.folder] = self._made(run)
        return self._known[run.folder]

    def _made(self, run: Run) -> str:
        if not run.config:
            return str(run.folder)
        settings: dict[str, Any] = {
            key: value
            for key, value in run.config.items()
            if not key.startswith(OWN_TO_A_RUN) and key not in SEEDS
        }
        path = settings.get(TEACHER_PATH)
        if isinstance(path, str):
            # Students of teachers that differ in their seed only differ in their seed only.
            teachers = {self.of(r) for r in self.runs if is_at(r.folder, Path(path))}
            settings[TEACHER_PATH] = teachers.pop() if len(teachers) == 1 else path
        return json.dumps([run.name, run.method, run.updates, settings], default=str)


def is_at(folder: Path, named: Path) -> bool:
    """Whether a run's folder, or its experiment's, is the one a configuration names.

    The configuration's path was relative to a working directory that is gone, so ends must match.
    """
    wanted = [part for part in named.parts if part not in (".", "..", "/")]
    here = folder.resolve()
    return any(list(path.parts[-len(wanted) :]) == wanted for path in (here, here.parent))
