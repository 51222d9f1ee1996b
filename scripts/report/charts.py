"""Line charts as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

Points = Sequence[tuple[float, float]]

COLOURS = 8
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-5l5 5-5 5-5-5z",
    "M0-5l4.6 8.4h-9.2z",
)
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        style: which colour, marker and dash; a run keeps its own all over the page.
        faint: a second line behind the first, such as unsmoothed values.
        hints: what hovering over a point tells, one a point.
        labels: text beside the points, one a point.
        marked: whether points are drawn.
    """

    style: int
    points: Points
    faint: Points = ()
    hints: Sequence[str] = ()
    labels: Sequence[str] = ()
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels.

    Attributes:
        ticks: values that get a line and a number; nice ones if none are given.
    """

    title: str
    log: bool = False
    ticks: Sequence[float] = ()


@dataclass(frozen=True)
class Frame:
    """Size of a chart and the margins around its lines, in SVG units."""

    width: int = 430
    height: int = 300
    left: int = 52
    right: int = 14
    top: int = 10
    bottom: int = 42
    font: int = 13


@dataclass(frozen=True)
class _Scale:
    axis: Axis
    low: float
    high: float
    first: float
    last: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        share = (self._inner(value) - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value


def short(value: float) -> str:
    """A tick's number: 0.02, 1.5, 400, 12k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def usable(points: Points, x: Axis, y: Axis) -> list[tuple[float, float]]:
    """Points that can be drawn: finite, and positive on logarithmic axes."""

    def fits(value: float, axis: Axis) -> bool:
        return math.isfinite(value) and (value > 0 or not axis.log)

    return [(a, b) for a, b in points if fits(a, x) and fits(b, y)]


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, name: str, frame: Frame | None = None
) -> str:
    """An SVG of some lines; empty if there is nothing to draw.

    Every point must be :func:`usable`.
    """
    frame = frame or Frame()
    drawn = [p for s in series for p in (*s.points, *s.faint)]
    if not drawn:
        return ""
    to_y = _scale(y, [p[1] for p in drawn], frame.height - frame.bottom, frame.top)
    # Room for the longest number beside the axis; a digit is about 0.62 of the font wide.
    longest = max((len(short(value)) for value in to_y.ticks), default=0)
    left = max(frame.left, round(0.62 * frame.font * longest) + 10)
    frame = replace(frame, left=left)
    to_x = _scale(x, [p[0] for p in drawn], frame.left, frame.width - frame.right)
    parts = [*_grid(to_x, to_y, frame)]
    parts += [_line(s.faint, s.style, to_x, to_y, "raw") for s in series if s.faint]
    parts += [_line(s.points, s.style, to_x, to_y, "line") for s in series]
    for s in series:
        parts += _points(s, to_x, to_y)
    label = escape(name)
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{label}" '
        f'font-size="{frame.font}"><title>{label}</title>{"".join(parts)}</svg>'
    )


def key(style: int) -> str:
    """A small picture of a line's looks, for legends."""
    return (
        f'<svg class="key s{style % COLOURS}" viewBox="-14 -7 28 14" aria-hidden="true">'
        f'<path class="line" d="M-13 0H13"{_dash(style)}/><path class="dot" d="{_marker(style)}"/>'
        "</svg>"
    )


def _marker(style: int) -> str:
    return MARKERS[(style + style // COLOURS) % len(MARKERS)]


def _dash(style: int) -> str:
    dash = DASHES[style // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _line(points: Points, style: int, to_x: _Scale, to_y: _Scale, kind: str) -> str:
    if len(points) < 2:
        return ""
    path = "L".join(f"{to_x(a):g} {to_y(b):g}" for a, b in points)
    return f'<path class="{kind} s{style % COLOURS}" d="M{path}"{_dash(style)}/>'


def _points(s: Series, to_x: _Scale, to_y: _Scale) -> list[str]:
    parts = []
    if s.marked or len(s.points) == 1:
        for i, (a, b) in enumerate(s.points):
            hint = f"<title>{escape(s.hints[i])}</title>" if s.hints else ""
            parts.append(
                f'<path class="dot s{s.style % COLOURS}" d="{_marker(s.style)}" '
                f'transform="translate({to_x(a):g} {to_y(b):g})">{hint}</path>'
            )
    for (a, b), label in zip(s.points, s.labels, strict=False):
        parts.append(f'<text x="{to_x(a) + 7:g}" y="{to_y(b) + 4:g}">{escape(label)}</text>')
    return parts


# ---------------------------------------------------------------------- scales and ticks


def _scale(axis: Axis, values: Sequence[float], first: float, last: float) -> _Scale:
    low, high = min(values), max(values)
    if axis.log:
        low, high = math.log10(low), math.log10(high)
    room = 0.05 * (high - low) or (0.15 if axis.log else abs(high) * 0.1 or 1.0)
    # A quantity that cannot be negative is not drawn as if it could.
    low = max(low - room, 0.0) if not axis.log and low >= 0 else low - room
    high += room
    found = list(axis.ticks) or (_log_ticks(low, high) if axis.log else _ticks(low, high))
    return _Scale(axis, low, high, first, last, found)


def _ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room; bounds are exponents."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [d * 10.0**p for p in powers for d in digits]
        found = [v for v in found if low <= math.log10(v) <= high]
        if len(found) >= 4:
            return found[:: max(1, len(found) // 7)]
    # Within a narrow range a logarithm is almost straight.
    return _ticks(10**low, 10**high)


def _grid(to_x: _Scale, to_y: _Scale, frame: Frame) -> list[str]:
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    parts = []
    for value in to_y.ticks:
        at = to_y(value)
        parts.append(f'<path class="grid" d="M{frame.left} {at:g}H{right}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 6}" y="{at + frame.font * 0.35:g}" '
            f'text-anchor="end">{short(value)}</text>'
        )
    for value in to_x.ticks:
        at = to_x(value)
        parts.append(f'<path class="grid" d="M{at:g} {frame.top}V{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at:g}" y="{bottom + frame.font * 1.3:g}" '
            f'text-anchor="middle">{short(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{frame.left} {frame.top}V{bottom}H{right}"/>')
    middle = (frame.left + right) / 2
    if to_x.axis.title:
        parts.append(
            f'<text class="name" x="{middle:g}" y="{frame.height - 5}" text-anchor="middle">'
            f"{escape(to_x.axis.title)}</text>"
        )
    return parts
