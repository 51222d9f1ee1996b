"""Numbers as lines: charts of means and deviations as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, Sequence[float]]]
Lines = Mapping[str, Points]

COLOURS = ("#2563a8", "#b4541a", "#2f8f4e", "#8a3fa0", "#c02f4b", "#6b6b6b", "#0f8b8d", "#a07d00")
SCALE = 2  # drawn larger, for a sharp picture
WIDEST, NARROWEST, HEIGHT, GAP, LINE, LEFT = 680, 300, 190, 16, 18, 64
LOG_FROM = 8.0  # ratio of largest to smallest from which an axis is logarithmic


def line_charts(
    rows: Sequence[Mapping[str, Lines]],
    axis: str,
    ticks: Mapping[float, str] | None = None,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Each line's means, with bars of one standard deviation either way.

    Args:
        rows: from top to bottom, charts by title that stand side by side and share their vertical
            axis; of each its lines by name: places on the axis, and the values there. What is not
            finite is left out.
        axis: what the places are, in words.
        ticks: what is written at a place, if not its number.
        notes: lines of text below all.
    """
    names = dict.fromkeys(name for charts in rows for lines in charts.values() for name in lines)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns = max(map(len, rows), default=1)
    width = max(NARROWEST, WIDEST // columns)
    head, tall = LINE * len(names) + 2 * GAP, HEIGHT + 4 * LINE
    foot = head + len(rows) * tall
    size = (columns * (LEFT + width) + 2 * GAP, foot + LINE * (1 + len(notes)) + GAP)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = _Pen(ImageDraw.Draw(image))
    for number, (name, colour) in enumerate(colours.items()):
        middle = GAP + (number + 0.5) * LINE
        pen.line([(GAP, middle), (GAP + 24, middle)], colour)
        pen.text((GAP + 32, middle), name, "lm")
    for row, charts in enumerate(rows):
        drawn = {
            title: {n: _summed(p) for n, p in lines.items()} for title, lines in charts.items()
        }
        across, up = _scales([p for lines in drawn.values() for ps in lines.values() for p in ps])
        for column, (title, lines) in enumerate(drawn.items()):
            corner = (GAP + LEFT + column * (LEFT + width), head + row * tall + LINE)
            chart = _Chart(pen, corner, width, across, up)
            chart.frame(title, ticks or {})
            for name, points in lines.items():
                chart.line(points, colours[name])
    for number, words in enumerate([axis, *notes]):
        pen.text((GAP, foot + number * LINE), words)
    return image


@dataclass(frozen=True)
class _Point:
    """A line at one place."""

    x: float
    mean: float
    deviation: float


def _summed(points: Points) -> list[_Point]:
    finite = [(x, [v for v in values if math.isfinite(v)]) for x, values in points]
    return [
        _Point(x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for x, values in finite
        if values
    ]


@dataclass(frozen=True)
class _Scale:
    """Values as shares of an axis.

    Attributes:
        marks: values that are written beside it.
        low, high: its ends; what lies below is drawn there.
    """

    marks: tuple[float, ...]
    low: float
    high: float
    logarithmic: bool

    def __call__(self, value: float) -> float:
        low, high, value = self.low, self.high, max(value, self.low)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5


def _scales(points: Sequence[_Point]) -> tuple[_Scale, _Scale]:
    """The two axes of charts of these points: along, with a mark a place, and up."""
    places = sorted({p.x for p in points}) or [1.0]
    means = [p.mean for p in points] or [1.0]
    ends = [end for p in points for end in (p.mean - p.deviation, p.mean + p.deviation)] or [1.0]
    along = _Scale(tuple(places), places[0], places[-1], _far_apart(places))
    low, high = min(ends), max(ends)
    if not _far_apart(means):
        return along, _Scale((low, high), low, high, False)
    low = max(low, min(means) / 2)  # a mean less its deviation may be zero and below
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    marks = tuple(10.0**power for power in powers) if len(powers) > 1 else (low, high)
    return along, _Scale(marks, low, high, True)


def _far_apart(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


class _Pen:
    """Draws in units of the picture before it is enlarged."""

    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self.pen = pen
        self.font = ImageFont.load_default(12 * SCALE)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int = 2) -> None:
        self.pen.line([(x * SCALE, y * SCALE) for x, y in points], colour, width * SCALE)

    def dot(self, x: float, y: float, colour: str) -> None:
        box = [(x - 3) * SCALE, (y - 3) * SCALE, (x + 3) * SCALE, (y + 3) * SCALE]
        self.pen.ellipse(box, fill=colour)

    def text(self, at: tuple[float, float], words: str, anchor: str = "la") -> None:
        place = (at[0] * SCALE, at[1] * SCALE)
        self.pen.text(place, words, "black", self.font, anchor, align="center")


class _Chart:
    """One pair of axes, whose upper left corner is given."""

    def __init__(
        self, pen: _Pen, corner: tuple[float, float], width: float, across: _Scale, up: _Scale
    ) -> None:
        self.pen, self.corner, self.width = pen, corner, width
        self.across, self.up = across, up

    def _x(self, value: float) -> float:
        return self.corner[0] + 2 * GAP + (self.width - 4 * GAP) * self.across(value)

    def _y(self, value: float) -> float:
        return self.corner[1] + HEIGHT - GAP / 2 - (HEIGHT - GAP) * self.up(value)

    def frame(self, title: str, ticks: Mapping[float, str]) -> None:
        """Axes, their marks, and what is drawn."""
        left, top = self.corner
        right, bottom = left + self.width - GAP, top + HEIGHT
        self.pen.text((left, top - LINE), title)
        for value in self.up.marks:
            self.pen.line([(left, self._y(value)), (right, self._y(value))], "#dddddd", 1)
            self.pen.text((left - 6, self._y(value)), f"{value:.4g}", "rm")
        self.pen.line([(left, top), (left, bottom), (right, bottom)], "black", 1)
        for value in self.across.marks:
            self.pen.text((self._x(value), bottom + 3), ticks.get(value, f"{value:g}"), "ma")

    def line(self, points: Sequence[_Point], colour: str) -> None:
        """Means, joined, and their deviations."""
        if len(points) > 1:
            self.pen.line([(self._x(p.x), self._y(p.mean)) for p in points], colour)
        for p in points:
            ends = (self._y(p.mean - p.deviation), self._y(p.mean + p.deviation))
            self.pen.line([(self._x(p.x), end) for end in ends], colour, 1)
            self.pen.dot(self._x(p.x), self._y(p.mean), colour)
