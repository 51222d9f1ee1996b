"""What was gated, as a table to print."""

from __future__ import annotations

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
