"""Numbers against depth as lines, both axes logarithmic; one panel a network and number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scripts.gates.sensitivity import Measured, lines_of

COLOURS = {"identity": "#b4541a", "depth": "#2563a8", "ode": "#2e8b57", "zero": "#777777"}
LABELS = {
    "identity": "alpha = 1",
    "depth": "alpha = 1 / sqrt(2L)",
    "ode": "alpha = 1 / (2L)",
    "zero": "alpha = 0",
}
PANELS = {
    "growth": "|z_L| / |z_0|",
    "amplification": "g_0 / g_L",
    "error": "relative error in bfloat16",
    "error_wide": "the same, stream in float32",
}
SCALE = 2  # drawn larger, for a sharp picture
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 170, 62, 44, 26
Points = list[tuple[int, float]]


def draw(rows: Sequence[Measured], path: Path) -> None:
    """Draws a panel for each network and number, a line for each start of alpha.

    Panels of one number share an axis, except that numbers beyond a million are cut off. What is
    not finite, or zero, has no place on it.
    """
    networks = list(dict.fromkeys(row.network for row in rows))
    depths = sorted({row.depth for row in rows})
    size = (GAP + len(networks) * (LEFT + WIDTH), TOP + len(PANELS) * (HEIGHT + 2 * GAP) + 2 * GAP)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = _Pen(ImageDraw.Draw(image))
    for place, init in enumerate(dict.fromkeys(row.init for row in rows)):
        left = LEFT + place * 190
        pen.line([(left, 16), (left + 22, 16)], COLOURS[init])
        pen.text((left + 28, 9), LABELS[init])
    for down, (name, title) in enumerate(PANELS.items()):
        known = [v for row in rows if _has_place(v := getattr(row, name))]
        low, high = _decades(known)
        for across, network in enumerate(networks):
            own = [row for row in rows if row.network == network]
            corner = (LEFT + across * (LEFT + WIDTH), TOP + GAP + down * (HEIGHT + 2 * GAP))
            panel = _Panel(pen, corner, depths, low, high)
            panel.frame(f"{network}: {title}")
            for init, points in lines_of(own, name):
                panel.line(points, COLOURS[init])
    pen.text((LEFT, size[1] - GAP), "number of blocks L, each of two branches; at initialisation")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def _has_place(value: float) -> bool:
    return math.isfinite(value) and 0 < value <= 1e6


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    bottom, top = math.floor(math.log10(low) + 0.05), math.ceil(math.log10(high) - 0.05)
    return bottom, max(top, bottom + 1)


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

    def text(self, at: tuple[float, float], words: str) -> None:
        self.pen.text((at[0] * SCALE, at[1] * SCALE), words, fill="black", font=self.font)


class _Panel:
    """One pair of axes, from ``10^low`` to ``10^high``."""

    def __init__(
        self, pen: _Pen, corner: tuple[int, int], depths: Sequence[int], low: int, high: int
    ) -> None:
        self.pen, self.corner, self.depths = pen, corner, depths
        self.low, self.high = low, high

    def _x(self, depth: int) -> float:
        span = math.log(self.depths[-1] / self.depths[0]) or 1.0
        return self.corner[0] + 10 + (WIDTH - 20) * math.log(depth / self.depths[0]) / span

    def _y(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.corner[1] + HEIGHT * (1 - share)

    def frame(self, title: str) -> None:
        """Axes, a thin line a power of ten, and the depths."""
        left, top = self.corner
        self.pen.text((left, top - 18), title)
        for power in range(self.low, self.high + 1):
            y = self._y(10.0**power)
            self.pen.line([(left, y), (left + WIDTH, y)], "#dddddd", 1)
            self.pen.text((left - 48, y - 7), f"{10.0**power:g}")
        self.pen.line([(left, top), (left, top + HEIGHT), (left + WIDTH, top + HEIGHT)], "black", 1)
        for depth in self.depths:
            self.pen.text((self._x(depth) - 4 * len(str(depth)), top + HEIGHT + 3), str(depth))

    def line(self, points: Points, colour: str) -> None:
        """Points that have a place, joined."""
        placed = [(self._x(depth), self._y(v)) for depth, v in points if _has_place(v)]
        if len(placed) > 1:
            self.pen.line(placed, colour)
        for x, y in placed:
            self.pen.dot(x, y, colour)
