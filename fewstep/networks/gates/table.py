"""What was gated, as a table to print."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fewstep.networks.gates.spec import ResidualGates

HEAD = ("gate", "of", "channels", "parameters")


@dataclass(frozen=True)
class Row:
    """A gate: its name, what class of block it is of, that one's channels and its parameters."""

    name: str
    kind: str
    channels: int | None
    parameters: int


@dataclass(frozen=True)
class GateTable:
    """All gates of a network.

    Attributes:
        spec: their options.
        rows: the units' gates in the network's order, then those of the long skips.
        starts: the values that alpha starts at; more than one where there is more than one stream.
    """

    spec: ResidualGates
    rows: tuple[Row, ...]
    starts: tuple[float, ...] = ()

    @property
    def parameters(self) -> int:
        """How many parameters all gates have."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        cells = [
            HEAD,
            *((r.name, r.kind, str(r.channels or ""), f"{r.parameters:,}") for r in self.rows),
        ]
        a, b, c, d = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = [f"{w:<{a}}  {x:<{b}}  {y:>{c}}  {z:>{d}}" for w, x, y, z in cells]
        return "\n".join([*lines, self.summary])

    @property
    def overview(self) -> str:
        """A line for all gates whose names differ in numbers alone, and which numbers these are."""
        alike: dict[str, list[list[int]]] = {}
        for row in self.rows:
            key = re.sub(r"\d+", "{}", row.name)
            alike.setdefault(key, []).append(
                [int(number) for number in re.findall(r"\d+", row.name)]
            )
        counts = [str(len(numbers)) for numbers in alike.values()]
        wide = max(map(len, counts), default=0)
        lines = [
            f"  {count:>{wide}} x {key.format(*map(_ranges, zip(*numbers, strict=True)))}"
            for count, (key, numbers) in zip(counts, alike.items(), strict=True)
        ]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """How many gates there are, and which."""
        spec = self.spec
        skips = ", long skips too" if spec.skip else ""
        alphas = " and ".join(f"{alpha:.4g}" for alpha in self.starts)
        init = spec.init if spec.init == "identity" else f"{spec.init} (alpha {alphas})"
        return (
            f"{len(self.rows)} gates with {self.parameters:,} parameters: mode {spec.mode} at the "
            f"{spec.level} level, init {init}{skips}."
        )


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
