"""The plan: every run of a suite, its folder, and what is left to do."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from callbacks.results import FILE_NAME
from fewstep.errors import FewstepError, nearest
from scripts.report.data import CONFIG_FILE
from scripts.slurm.queue import queued
from scripts.suite.files import Suite
from scripts.suite.states import Asked, Standing, State, standing_of
from scripts.suite.variants import Variant, check, variants_of

OPEN = (State.TODO, State.PARTLY, State.MEASURE, State.FAILED)
UNTRAINED = (State.TODO, State.PARTLY, State.FAILED)
COLUMNS = ("task", "run", "seed", "updates", "state", "")


@dataclass(eq=False)
class Cell:
    """One run of the suite: a variant with a seed.

    Attributes:
        folder: where it is kept, such as ``runs/digits/pcm_4/seed_0``.
        parents: the runs it is given, finished.
        wanted: whether it was asked for, or is needed by one that was.
    """

    variant: Variant
    seed: int
    folder: Path
    asked: Asked
    standing: Standing
    parents: tuple[Cell, ...]
    wanted: bool = True

    @property
    def name(self) -> str:
        """The label and seed."""
        return f"{self.variant.label}, seed {self.seed}"

    @property
    def open(self) -> bool:
        """Whether it is to be run now."""
        return self.wanted and self.standing.state in OPEN

    def prepare(self, where: str, **trainer: Any) -> Path:
        """Writes the configuration as it is now, which is what will run whatever is edited later.

        Args:
            where: a folder in the run's.
            trainer: options of the trainer that depend on the machine.
        """
        config = copy.deepcopy(self.asked.config)
        config["trainer"].update(trainer)
        path = self.folder / where / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        if self.standing.state is State.MEASURE:
            shutil.copyfile(path, self.folder / CONFIG_FILE)
            results = self.folder / FILE_NAME
            if results.exists():  # numbers of another protocol must not stand beside the new ones
                results.replace(results.with_name(f"{FILE_NAME}.before"))
        return path


@dataclass
class Plan:
    """A suite's runs, each behind those it needs."""

    suite: Suite
    home: Path
    cells: list[Cell]

    @property
    def open(self) -> list[Cell]:
        """What is to be run."""
        return [cell for cell in self.cells if cell.open]

    def in_state(self, *states: State) -> list[Cell]:
        """The wanted runs in some states."""
        return [c for c in self.cells if c.wanted and c.standing.state in states]


def make_plan(
    suite: Suite, home: Path, only: Sequence[str] | None = None, fresh: bool = False
) -> Plan:
    """Checks the whole suite and looks at what there is; changes nothing.

    Args:
        home: the suite's folder, such as ``runs/digits``.
        only: patterns of labels; what those need is run too.
        fresh: run changed ones anew, in folders of their own.

    Raises:
        FewstepError: for whatever is wrong in the suite or its experiments.
    """
    variants = variants_of(suite)
    check_patterns(only or [], variants)
    for variant in tqdm(variants, "Checking experiments", leave=False, disable=None):
        check(variant, home)
    queue = queued()
    cells: dict[tuple[Variant, int], Cell] = {}
    for variant in variants:
        for seed in variant.entry.seeds:
            parents = {
                key: cells[parent, variant.seed_of_parent(parent, seed)]
                for key, parent in variant.parents.items()
            }
            cells[variant, seed] = place_cell(variant, seed, parents, home, queue, fresh)
    plan = Plan(suite, home, list(cells.values()))
    select(plan, only)
    return plan


def place_cell(
    variant: Variant,
    seed: int,
    parents: dict[str, Cell],
    home: Path,
    queue: dict[str, str],
    fresh: bool,
) -> Cell:
    """Finds the run's folder: the newest one trained with this configuration, or the next."""
    config = copy.deepcopy(variant.config)
    config["seed_everything"] = seed
    for key, parent in parents.items():
        put(config, key, str(parent.folder))
    below = {key: parent.folder.relative_to(home) for key, parent in parents.items()}
    asked = Asked(config, below, frozenset(variant.overrides))
    first = home / variant.label / f"seed_{seed}"
    there = [(run, standing_of(run, asked, queue)) for run in numbered(first) if run.is_dir()]
    fitting = [pair for pair in there if pair[1].state is not State.CHANGED]
    folder, standing = next(iter(fitting or there), (first, Standing(State.TODO)))
    lost = [parent.name for parent in parents.values() if parent.standing.state in UNTRAINED]
    if lost and standing.state in (State.DONE, State.MEASURE, State.PARTLY):
        standing = Standing(State.CHANGED, f"it was trained from another {lost[0]}")
    if standing.state is State.CHANGED and fresh:
        folder, standing = next_free(first), Standing(State.TODO, f"anew: {standing.detail}")
    config["run"]["version"] = folder.name
    return Cell(variant, seed, folder, asked, standing, tuple(parents.values()))


def numbered(first: Path) -> list[Path]:
    """``seed_0`` and its later versions, ``seed_0_version_1`` and on, the newest first."""
    start = f"{first.name}_version_"
    later = [p for p in first.parent.glob(f"{start}*") if p.name.removeprefix(start).isdigit()]
    later.sort(key=lambda path: int(path.name.removeprefix(start)), reverse=True)
    return [*later, first]


def next_free(first: Path) -> Path:
    """The folder of the next version."""
    newest = numbered(first)[0]
    number = 0 if newest == first else int(newest.name.rpartition("_")[2])
    return first.with_name(f"{first.name}_version_{number + 1}")


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key that is there."""
    *folders, last = key.split(".")
    for folder in folders:
        config = config[folder]
    config[last] = value


# ---------------------------------------------------------------------- choosing


def matches(label: str, pattern: str) -> bool:
    """Whether a pattern chooses a label, or the entry whose grid it is of."""
    entry, _, _ = label.partition(",")
    return fnmatchcase(label, pattern) or fnmatchcase(entry, pattern)


def check_patterns(only: Sequence[str], variants: list[Variant]) -> None:
    """Refuses patterns that choose nothing."""
    labels = [variant.label for variant in variants]
    for pattern in only:
        if not any(matches(label, pattern) for label in labels):
            raise FewstepError(
                f"--only {pattern} chooses no entry.{nearest(pattern, labels)} "
                f"The suite has: {', '.join(labels)}."
            )


def select(plan: Plan, only: Sequence[str] | None) -> None:
    """Marks what matches, and what that needs and is not done."""
    if not only:
        return
    for cell in reversed(plan.cells):
        asked = any(matches(cell.variant.label, pattern) for pattern in only)
        needed = any(
            other.wanted and cell in other.parents and other.standing.state is not State.DONE
            for other in plan.cells
        )
        cell.wanted = asked or (needed and cell.standing.state is not State.DONE)


def refuse_changed(plan: Plan) -> None:
    """A run trained with another configuration is not passed off as this one.

    Raises:
        FewstepError: naming them, and what has changed.
    """
    changed = plan.in_state(State.CHANGED)
    if changed:
        lines = [f"  {cell.folder}: {cell.standing.detail}" for cell in changed[:5]]
        more = [f"  and {len(changed) - 5} more"] if len(changed) > 5 else []
        raise FewstepError(
            "These runs were trained with another configuration than the suite asks for now:\n"
            + "\n".join([*lines, *more])
            + "\n--fresh runs them anew, in folders of their own beside the old ones."
        )


def print_plan(plan: Plan) -> None:
    """Prints the plan as a table."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for number, cell in enumerate(plan.cells):
        state = cell.standing.state if cell.wanted else "left out"
        about = cell.standing.detail if cell.wanted else cell.standing.state
        updates = f"{cell.asked.max_steps:,}"
        rows.append((str(number), cell.variant.label, str(cell.seed), updates, state, about))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
