"""What became of a suite's runs, so that tables can say which ones their numbers are without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.suite.plan import Cell, Plan
from scripts.suite.states import DIVERGED, State
from scripts.suite.variants import Variant


@dataclass
class Outcome:
    """What became of the runs of a variant.

    Attributes:
        done: folders of those that are done, one a training seed.
        others: what became of the others, such as ``diverged``, to their seeds.
    """

    done: list[Path] = field(default_factory=list)
    others: dict[str, list[int]] = field(default_factory=dict)

    @property
    def tried(self) -> bool:
        """Whether a run has come to an end, good or bad."""
        return bool(self.done) or not self.others.keys().isdisjoint((DIVERGED, State.FAILED))

    @property
    def shortfall(self) -> str:
        """``2 of 3 runs, 1 diverged``; empty if all are done."""
        total = len(self.done) + sum(map(len, self.others.values()))
        kinds = [f"{len(seeds)} {kind}" for kind, seeds in self.others.items()]
        return ", ".join([f"{len(self.done)} of {total} runs", *kinds]) if kinds else ""


def outcomes(plan: Plan) -> dict[Variant, Outcome]:
    """What became of each variant, in the suite's order."""
    found: dict[Variant, Outcome] = {}
    for cell in plan.cells:
        outcome = found.setdefault(cell.variant, Outcome())
        if cell.standing.state is State.DONE:
            outcome.done.append(cell.folder)
        else:
            outcome.others.setdefault(_kind(cell), []).append(cell.seed)
    return found


def _kind(cell: Cell) -> str:
    diverged = cell.standing.state is State.FAILED and cell.standing.detail.startswith(DIVERGED)
    return DIVERGED if diverged else str(cell.standing.state)


def left_out(found: Mapping[Variant, Outcome]) -> str:
    """A Markdown list of the runs that are in no table; empty if there are none."""
    lines, untried = [], 0
    for variant, outcome in found.items():
        kinds = (f"{k} (seed {', '.join(map(str, s))})" for k, s in outcome.others.items())
        if not outcome.tried:
            untried += sum(map(len, outcome.others.values()))
        elif outcome.others:
            lines.append(f"- `{variant.label}`: {'; '.join(kinds)}\n")
    if untried:
        lines.append(f"- {untried} runs of which no other of their kind has come to an end\n")
    return f"Runs that are not in these numbers\n\n{''.join(lines)}" if lines else ""
