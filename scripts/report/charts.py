"""Line charts as plain data; the page's script draws those that come into view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Points = Sequence[tuple[float, float]]

MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        group: the group of runs it belongs to, whose colour, marker and dash it has.
        name: what hovering over it says.
        variant: tells further lines of a group, such as other roles, from its first.
        faint: a second line behind the first, such as unsmoothed values.
        errors: half the length of a vertical bar through each point; 0 draws none.
        hints: what hovering over a point tells, one a point.
        labels: text beside the points, one a point.
        marked: whether points are drawn.
    """

    group: int
    name: str
    points: Points
    variant: int = 0
    faint: Points = ()
    errors: Sequence[float] = ()
    hints: Sequence[str] = ()
    labels: Sequence[str] = ()
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """A scale; ``ticks`` are values that get a line and a number, nice ones if none are given."""

    title: str
    log: bool = False
    ticks: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over common axes; ``name`` is what a screen reader says."""

    name: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(s.points for s in self.series)

    def data(self) -> dict[str, Any]:
        """The chart as JSON takes it."""
        return {
            "name": self.name,
            "x": {"title": self.x.title, "log": self.x.log, "ticks": list(self.x.ticks)},
            "y": {"title": self.y.title, "log": self.y.log, "ticks": list(self.y.ticks)},
            "series": [_data(s) for s in self.series if s.points],
        }


def _data(s: Series) -> dict[str, Any]:
    found: dict[str, Any] = {
        "group": s.group,
        "name": s.name,
        "x": [_rounded(x) for x, _ in s.points],
        "y": [_rounded(y) for _, y in s.points],
    }
    if s.faint:
        found["faint"] = [[_rounded(x) for x, _ in s.faint], [_rounded(y) for _, y in s.faint]]
    if any(s.errors):
        found["errors"] = [_rounded(e) for e in s.errors]
    optional = {"variant": s.variant, "hints": list(s.hints), "labels": list(s.labels)}
    return found | {k: v for k, v in optional.items() if v} | ({"marked": True} if s.marked else {})


def _rounded(value: float) -> float:
    """Five digits, more than a screen can show."""
    short = float(f"{value:.5g}")
    return int(short) if short == int(short) else short


def usable(points: Points, x: Axis, y: Axis) -> list[tuple[float, float]]:
    """Points that can be drawn: finite, and positive on logarithmic axes."""

    def fits(value: float, axis: Axis) -> bool:
        return math.isfinite(value) and (value > 0 or not axis.log)

    return [(a, b) for a, b in points if fits(a, x) and fits(b, y)]


def running_mean(points: Points) -> list[tuple[float, float]]:
    """A centred running mean over a twelfth of a curve; short curves stay as they are.

    Towards the ends the window shrinks on both sides alike, which keeps it centred, and the line
    stops where less than half of it is left.
    """
    reach = len(points) // 24
    if reach < 1:
        return list(points)
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    smooth = []
    for i, (step, _) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)
        if 2 * half >= reach:
            smooth.append((step, (totals[i + half + 1] - totals[i - half]) / (2 * half + 1)))
    return smooth


def downsample(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: the lowest and highest of each stretch, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    count = most // 2
    bounds = [len(points) * i // count for i in range(count + 1)]
    kept: list[tuple[float, float]] = []
    for first, end in pairwise(bounds):
        stretch = points[first:end]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept
