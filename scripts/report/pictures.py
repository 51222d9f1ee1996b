"""Sample pictures inside the page, side by side at equal step counts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from scripts.report.boards import Board
from scripts.report.data import Picture, Run
from scripts.report.findings import figure

SHOWN_WIDTH = 360
"""Tiny pictures are enlarged by a whole factor to about this width, in CSS pixels."""

LARGEST_FILE = 1_500_000
LARGEST_SIDE = 1600


def pictures_section(runs: Sequence[Run], boards: Sequence[Board], notes: list[str]) -> str:
    """All pictures by step count; damaged ones are added to the notes."""
    pictures = [(run, picture) for run in runs for picture in run.pictures]
    if not pictures:
        return '<p class="note">None of these runs has sample pictures.</p>'
    teachers = {(row.run.label, row.role) for b in boards for row in b.rows if row.is_teacher}
    pictures.sort(key=lambda item: (item[0].label, item[1].role) not in teachers)
    parts = [f'<p class="note">{escape(_noise_note([run for run, _ in pictures]))}</p>']
    for steps in sorted({picture.num_steps for _, picture in pictures}):
        figures = [
            _figure(run, picture, boards, notes)
            for run, picture in pictures
            if picture.num_steps == steps
        ]
        if any(figures):
            title = f"{steps} step{'s' * (steps != 1)}"
            parts.append(f'<h3>{title}</h3><div class="pictures">{"".join(figures)}</div>')
    return "".join(parts)


def _noise_note(runs: Sequence[Run]) -> str:
    """Whether all pictures start from the same noise, as far as the configurations tell."""
    key = "trainer.callbacks[Samples].init_args.seed"
    seeds = {str(run.config[key]) for run in runs if key in run.config}
    if len(seeds) > 1:
        return (
            f"Careful: these runs drew their pictures from different noise (seeds "
            f"{', '.join(sorted(seeds))})."
        )
    return (
        "All pictures are made from the same noise and the same conditions, in the same order, so "
        "the same place in two pictures of one data set shows what each made of the same start."
    )


def _figure(run: Run, picture: Picture, boards: Sequence[Board], notes: list[str]) -> str:
    try:
        source, width, height, shrunk = embed(picture.path)
    except (OSError, ValueError, SyntaxError) as error:
        notes.append(f"The picture {picture.path} cannot be read ({error}).")
        return ""
    factor = max(1, round(SHOWN_WIDTH / width))
    remarks = [f"{picture.role}, {picture.num_steps} step{'s' * (picture.num_steps != 1)}"]
    remarks += _values(run, picture, boards)
    if picture.updates != run.updates:
        remarks.append(f"after {picture.updates} updates, not {run.updates}")
    remarks += ["made smaller for this page"] * shrunk
    label = f"Samples of {run.label}, {remarks[0]}"
    return (
        f'<figure style="width:{min(factor * width, 2 * SHOWN_WIDTH)}px">'
        f'<img class="{"tiny" if factor > 1 else ""}" src="{source}" width="{factor * width}" '
        f'height="{factor * height}" alt="{escape(label)}" loading="lazy">'
        f"<figcaption><b>{escape(run.label)}</b><br>{escape(' · '.join(remarks))}</figcaption>"
        "</figure>"
    )


def _values(run: Run, picture: Picture, boards: Sequence[Board]) -> list[str]:
    """What was measured at the picture's role and step count."""
    return [
        f"{board.metric} {figure(row.cells[picture.num_steps].mean)}"
        for board in boards
        for row in board.rows
        if row.run is run and row.role == picture.role and picture.num_steps in row.cells
    ]


def embed(path: Path) -> tuple[str, int, int, bool]:
    """A picture as a data URL, its width and height, and whether it had to be made smaller.

    Raises:
        OSError, ValueError, SyntaxError: if it is no picture; which of them is Pillow's choice.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        width, height = image.size
        if len(content) <= LARGEST_FILE and image.format == "PNG":
            return _data_url("png", content), width, height, False
        smaller = image.convert("RGB")
    smaller.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=88)
    return _data_url("jpeg", buffer.getvalue()), *smaller.size, True


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
