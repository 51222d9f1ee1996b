"""Small bar charts, one below the other, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT, GAP, LINE = 640, 96, 12, 18
COLOUR = "#2563a8"


def bar_charts(series: Mapping[str, Sequence[float | None]]) -> Tensor:
    """One chart a series, its values from left to right; a uint8 image ``(3, H, W)``.

    Args:
        series: titles and values; None leaves a gap. Bars start at zero, which a line marks, and
            the title says how far the chart goes.
    """
    image = Image.new("RGB", (WIDTH, len(series) * (HEIGHT + LINE + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for row, (title, values) in enumerate(series.items()):
        top = GAP + row * (HEIGHT + LINE + GAP)
        known = [value for value in values if value is not None]
        low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0)
        extent = high - low or 1.0
        pen.text((GAP, top), f"{title}: {low:.3g} to {high:.3g}", fill="black", font=font)
        zero = top + LINE + HEIGHT * high / extent
        step = (WIDTH - 2 * GAP) / max(len(values), 1)
        for place, value in enumerate(values):
            if value is not None:
                ends = sorted((zero, zero - HEIGHT * value / extent))
                left = GAP + place * step
                pen.rectangle((left, ends[0], left + max(step - 2, 0), ends[1]), fill=COLOUR)
        pen.line((GAP, zero, WIDTH - GAP, zero), fill="black")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
