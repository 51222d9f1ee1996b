"""How sensitive untrained stacks are to their depth, with gates that start at different values."""

from __future__ import annotations

import copy
import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.gates import ResidualGates, apply_gates
from fewstep.networks.gates.sensitivity import measure, relative_error
from fewstep.networks.gates.spec import Init
from fewstep.seeding import torch_generator
from scripts.gates.stacks import HEAD_DIM, BlockStack, Kind

SAMPLES, TOKENS = 4, 16
Stream = Literal["same", "float32"]
ALPHAS: dict[Init, str] = {"identity": "1", "depth": "1/sqrt(2L)", "ode": "1/(2L)", "zero": "0"}
HEAD = (
    *("network", "alpha", "blocks", "norms z_L / z_0", "norms g_0 / g_L"),
    *("bf16 error", "bf16 error, float32 stream"),
)


@dataclass(frozen=True)
class Measured:
    """One stack, or the mean over several seeds.

    Attributes:
        network, init, depth: of which kind it is, where alpha starts, and how many blocks it has.
        growth: ``|z_L| / |z_0|``.
        amplification: ``|dL/dz_0| / |dL/dz_L|``.
        error: of ``z_L`` with weights, branches and the stream in bfloat16, relative to float32.
        error_wide: the same with the stream in float32.
    """

    network: Kind
    init: Init
    depth: int
    growth: float
    amplification: float
    error: float
    error_wide: float


NUMBERS = ("growth", "amplification", "error", "error_wide")


def measured(kind: Kind, init: Init, depth: int, width: int, seed: int) -> Measured:
    """Measures one stack of random weights on random tokens; the loss is a random projection.

    Raises:
        FewstepError: for gates that could never learn, as alpha at zero in adaLN-Zero.
    """
    stack = BlockStack(kind, depth, width, seed)
    numbers = torch_generator(seed, "sensitivity")
    z, projection = (torch.randn(SAMPLES, TOKENS, width, generator=numbers) for _ in range(2))
    gated = {stream: _gated(stack, init, stream) for stream in get_args(Stream)}
    start, outputs = z.clone().requires_grad_(True), list[Tensor]()

    def loss() -> Tensor:
        outputs.append(gated["same"](start))
        return (outputs[0] * projection).sum()

    found = measure(gated["same"], loss)
    assert found.amplification is not None
    half = z.to(torch.bfloat16)
    with torch.no_grad():
        errors = [
            relative_error(gated[stream].to(torch.bfloat16)(given), outputs[0])
            for stream, given in (("same", half), ("float32", z))
        ]
    return Measured(kind, init, depth, found.growth, found.amplification, *errors)


def _gated(stack: BlockStack, init: Init, stream: Stream) -> BlockStack:
    gated = copy.deepcopy(stack)
    apply_gates(gated, ResidualGates(mode="alpha", init=init, stream_dtype=stream))
    return gated


@dataclass(frozen=True)
class Study:
    """Which stacks are measured.

    Attributes:
        networks, inits, depths: in all combinations, but for adaLN-Zero with alpha at zero, which
            could never learn.
        width: channels of all.
        seeds: of the weights and tokens.

    Raises:
        FewstepError: for depths, seeds or a width that make no stack.
    """

    networks: Sequence[Kind]
    inits: Sequence[Init]
    depths: Sequence[int]
    width: int
    seeds: int

    def __post_init__(self) -> None:
        if min(self.depths) < 1 or self.seeds < 1:
            raise FewstepError("--depths and --seeds must be at least 1.")
        if self.width < HEAD_DIM or self.width % HEAD_DIM:
            raise FewstepError(f"--width must be a multiple of {HEAD_DIM}, not {self.width}.")

    def cases(self) -> list[tuple[Kind, Init, int]]:
        """Network, start and depth of all stacks, from those that take the shortest."""
        return [
            (network, init, depth)
            for depth in sorted(set(self.depths))
            for network in self.networks
            for init in self.inits
            if (network, init) != ("adaLN-Zero", "zero")
        ]

    def run(self, through: Callable[[list[int]], Iterable[int]] = iter) -> list[Measured]:
        """Measures all of it, and takes means over seeds.

        Args:
            through: a progress bar over the numbers of all stacks.
        """
        cases = [(case, seed) for case in self.cases() for seed in range(self.seeds)]
        found: dict[tuple[Kind, Init, int], list[Measured]] = {}
        for number in through(list(range(len(cases)))):
            case, seed = cases[number]
            one = measured(case[0], case[1], case[2], self.width, seed)
            found.setdefault(case, []).append(one)
        means = [_mean(each) for each in found.values()]
        order = list(self.networks), list(self.inits)
        return sorted(
            means, key=lambda m: (order[0].index(m.network), order[1].index(m.init), m.depth)
        )


def _mean(each: Sequence[Measured]) -> Measured:
    first = each[0]
    means = [statistics.fmean(getattr(one, name) for one in each) for name in NUMBERS]
    return Measured(first.network, first.init, first.depth, *means)


def table(rows: Sequence[Measured]) -> str:
    """The means as a table in Markdown, readable as it is."""
    lines = [HEAD, *map(_cells, rows)]
    wide = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    aligned = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(l_, wide, strict=True))]
        for l_ in lines
    ]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(wide)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (aligned[0], rule, *aligned[1:]))


def _cells(row: Measured) -> tuple[str, ...]:
    numbers = (_number(getattr(row, name)) for name in NUMBERS)
    return (row.network, ALPHAS[row.init], str(row.depth), *numbers)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def write_csv(rows: Sequence[Measured], path: Path) -> None:
    """All numbers in full."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Measured)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def lines_of(rows: Sequence[Measured], name: str) -> Iterator[tuple[Init, list[tuple[int, float]]]]:
    """A number against the depth, for each start of alpha."""
    for init in dict.fromkeys(row.init for row in rows):
        yield init, [(row.depth, getattr(row, name)) for row in rows if row.init == init]
