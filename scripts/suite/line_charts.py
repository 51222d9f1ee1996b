"""Charts of means and deviations, one below the other, as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, Sequence[float]]]

WIDTH, HEIGHT, GAP, LINE, LEFT = 760, 220, 16, 18, 72
COLOURS = ("#2563a8", "#b4541a", "#2f8f4e", "#8a3fa0", "#c02f4b", "#6b6b6b", "#0f8b8d", "#a07d00")
LOG_FROM = 8.0  # ratio of largest to smallest from which an axis is logarithmic
Scale = Callable[[float], float]


def line_charts(charts: Mapping[str, Mapping[str, Points]], axis: str) -> Image.Image:
    """One chart a quantity: each line's means, with bars of one standard deviation either way.

    Args:
        charts: by title, by line: places on the axis, and the values there.
        axis: what the places are.
    """
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    legend = LINE * len(names) + 2 * GAP
    image = Image.new("RGB", (WIDTH, legend + len(charts) * (HEIGHT + 2 * LINE + GAP)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for row, name in enumerate(names):
        top = GAP + row * LINE
        pen.line((GAP, top + 8, GAP + 24, top + 8), fill=colours[name], width=3)
        pen.text((GAP + 32, top), name, fill="black", font=font)
    for row, (title, lines) in enumerate(charts.items()):
        top = legend + row * (HEIGHT + 2 * LINE + GAP)
        pen.text((GAP, top), f"{title}, by {axis}", fill="black", font=font)
        _chart(pen, top + LINE, lines, colours)
    return image


def _chart(
    pen: ImageDraw.ImageDraw, top: float, lines: Mapping[str, Points], colours: Mapping[str, str]
) -> None:
    """Axes and lines; values that are not finite are left out."""
    drawn = {name: _summed(points) for name, points in lines.items()}
    places = sorted({x for points in drawn.values() for x, _, _ in points})
    if not places:
        return
    spreads = [(mean, sd) for points in drawn.values() for _, mean, sd in points]
    means = [mean for mean, _ in spreads]
    ends = [end for mean, sd in spreads for end in (mean - sd, mean + sd)]
    across = _scale(places, places, LEFT + GAP, WIDTH - 2 * GAP)
    up = _scale(ends, means, top + HEIGHT - GAP, top + GAP)
    font = ImageFont.load_default(12)
    pen.rectangle((LEFT, top, WIDTH - GAP, top + HEIGHT), outline="#999999")
    for x in places:
        pen.text((across(x) - 8, top + HEIGHT + 2), f"{x:g}", fill="black", font=font)
    for y in (min(means), max(means)):
        pen.line((LEFT - 4, up(y), LEFT, up(y)), fill="black")
        pen.text((GAP, up(y) - 7), f"{y:.3g}", fill="black", font=font)
    for name, points in drawn.items():
        path = [(across(x), up(mean)) for x, mean, _ in points]
        pen.line(path, fill=colours[name], width=2)
        for x, mean, sd in points:
            low, high = up(mean - sd), up(mean + sd)
            pen.line((across(x), low, across(x), high), fill=colours[name])
            pen.ellipse((across(x) - 3, up(mean) - 3, across(x) + 3, up(mean) + 3), colours[name])


def _summed(points: Points) -> list[tuple[float, float, float]]:
    """Place, mean and standard deviation."""
    finite = [(x, [v for v in values if math.isfinite(v)]) for x, values in points]
    return [
        (x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for x, values in finite
        if values
    ]


def _scale(values: Sequence[float], means: Sequence[float], first: float, last: float) -> Scale:
    """Values to pixels; logarithmic where means are positive and far apart."""
    logarithmic = min(means) > 0 and max(means) / min(means) >= LOG_FROM
    floor = min((v for v in values if v > 0), default=1.0) if logarithmic else 0.0

    def at(value: float) -> float:
        return math.log(max(value, floor)) if logarithmic else value

    low, high = at(min(values)), at(max(values))

    def pixel(value: float) -> float:
        share = (at(value) - low) / (high - low) if high > low else 0.5
        return first + share * (last - first)

    return pixel
