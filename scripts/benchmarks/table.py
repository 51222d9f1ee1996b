"""What ranks found, as rows of a table and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scripts.benchmarks.contestants import Case, Settings
from scripts.plan.table import size_text

COLUMNS = (
    ("strategy", 8),
    ("measured", -44),
    ("ours", 12),
    ("straightforward", 15),
    ("ratio", 5),
    ("samples/s", 9),
)


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        seconds, plain_seconds: ours and the straightforward way's, the slowest rank's median.
        samples: a second, over all ranks.
        bytes: peak memory of a step on the rank that needs most, or the size of a checkpoint.
        plain_bytes: size of the straightforward checkpoint.
        planned_bytes: what ``fewstep plan`` says of memory.
        note: a finding in words.
    """

    strategy: str
    measured: str
    seconds: float | None = None
    plain_seconds: float | None = None
    samples: float | None = None
    bytes: int | None = None
    plain_bytes: int | None = None
    planned_bytes: int | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as long the straightforward way takes."""
        if self.seconds is None or self.plain_seconds is None:
            return None
        return self.plain_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "ratio": self.ratio}

    def text(self) -> str:
        """The line."""
        cells = (
            self.strategy,
            self.measured,
            _duration(self.seconds),
            _duration(self.plain_seconds),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.samples is None else f"{self.samples:,.1f}",
        )
        return f"{_line(cells)}  {self._words()}".rstrip()

    def _words(self) -> str:
        if self.bytes is None:
            return self.note
        words = [f"{size_text(self.bytes)} {'a rank' if self.plain_bytes is None else 'on disk'}"]
        if self.plain_bytes is not None:
            words.append(f"straightforward {size_text(self.plain_bytes)}")
        if self.planned_bytes is not None:
            words.append(f"planned {size_text(self.planned_bytes)}")
        return ", ".join(words)


def header() -> str:
    """The columns' names and a rule."""
    names = f"{_line([name for name, _ in COLUMNS])}  memory or size"
    return f"{names}\n{'-' * (len(names) + 24)}"


def _line(cells: Sequence[str]) -> str:
    """The first two columns start at their left edge, the others end at their right one."""
    return "  ".join(
        cell.ljust(abs(width)) if number < 2 else cell.rjust(width)
        for number, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=True))
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1000 * seconds:,.2f} ms" if seconds < 1 else f"{seconds:,.3f} s"


def rows_of(case: Case, settings: Settings, ranks: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """The rows of one case, from what its ranks found."""
    first = ranks[0]
    seconds = max(rank["step"] for rank in ranks)
    compared = first["plain_step"] is not None
    yield Row(
        case.strategy,
        f"step, {name_of(case)}",
        seconds,
        max(rank["plain_step"] for rank in ranks) if compared else None,
        samples=settings.batch * len(ranks) / seconds,
        bytes=max(rank["memory"] for rank in ranks),
        planned_bytes=first["plan"]["bytes"] if "plan" in first else None,
    )
    if first["waits"] is not None:
        waits = sorted({rank["waits"] for rank in ranks} - {"none"})
        note = f"waits for the device at {'; '.join(waits)}" if waits else "passes"
        yield Row(case.strategy, f"no device sync in a step, {name_of(case)}", note=note)
    if "ema" in first:
        ours, loop = (max(rank["ema"][side] for rank in ranks) for side in (0, 1))
        yield Row(case.strategy, "EMA update", ours, loop)
    if "checkpoint" in first:
        taken = [rank["checkpoint"]["seconds"] for rank in ranks]
        ours, plain = (max(pair[side] for pair in taken) for side in (0, 1))
        written, whole = first["checkpoint"]["bytes"]
        kind = "sharded folder" if case.strategy == "fsdp2" else "one file"
        yield Row(
            case.strategy, f"checkpoint, {kind}", ours, plain, bytes=written, plain_bytes=whole
        )


def name_of(case: Case) -> str:
    """Method, precision where it is not float32, and compilation."""
    extras = ["bf16-mixed"] * (case.precision == "bf16-mixed") + ["compiled"] * case.compiled
    return ", ".join([case.method, *extras])
