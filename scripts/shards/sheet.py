"""A contact sheet: what the data looks like, at a glance."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scripts.shards.inspection import Picture

CELL = 160  # pixels of a picture's longer side
GAP = 10
LINES = 3  # of a caption
LINE = 13
CHARACTERS = 30  # of a line


def draw_sheet(pictures: Sequence[Picture], output: Path, columns: int = 8) -> Path:
    """Lays pictures out in rows with their captions below, and saves them as a PNG.

    Args:
        pictures: of any sizes; small ones are enlarged without smoothing.
        output: the file.
        columns: pictures a row.
    """
    columns = min(columns, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    across, down = CELL + GAP, CELL + LINES * LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + rows * down), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for number, picture in enumerate(pictures):
        left, top = GAP + number % columns * across, GAP + number // columns * down
        image = _fitted(Image.open(io.BytesIO(picture.png)))
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        text = textwrap.wrap(picture.caption, CHARACTERS, max_lines=LINES, placeholder=" ...")
        for line, words in enumerate(text):
            pen.text((left, top + CELL + 2 + line * LINE), words, fill="black", font=font)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    sheet.save(partial, format="PNG")
    partial.replace(output)
    return output


def _fitted(image: Image.Image) -> Image.Image:
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize(size, smooth)
