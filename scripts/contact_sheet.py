"""One picture of many runs' samples, captioned, from the pictures in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from fewstep.errors import FewstepError

SCALE = 3
GAP = 12
CAPTION = 16


def newest_picture(run: Path, role: str, num_steps: int) -> Path:
    """The latest picture of a role at a step count in a run's folder.

    Raises:
        FewstepError: if there is none.
    """
    found = sorted((run / "samples").glob(f"*_{role}_{num_steps}_steps.png"))
    if not found:
        raise FewstepError(f"'{run}' has no picture of {role} at {num_steps} steps.")
    return found[-1]


def contact_sheet(pictures: Sequence[tuple[str, Path]], output: Path, columns: int = 5) -> Path:
    """Lays out captioned pictures in rows, enlarged without smoothing, and saves them.

    Args:
        pictures: caption and file of each, all of one size.
        output: the PNG to write.
        columns: pictures a row.
    """
    images = [(caption, Image.open(path).convert("RGB")) for caption, path in pictures]
    width, height = (SCALE * side for side in images[0][1].size)
    rows = -(-len(images) // columns)
    cell = (width + GAP, height + CAPTION + GAP)
    sheet = Image.new("RGB", (GAP + columns * cell[0], GAP + rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, image) in enumerate(images):
        left, top = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        draw.text((left, top), caption, fill="black")
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top + CAPTION))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
    return output
