"""What gates have become, as a table and as a picture, and what a run saw of their streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from callbacks.gates import FILE_NAME, FOLDER, Row, read_gate_report
from fewstep.errors import FewstepError
from fewstep.networks import load_denoiser
from fewstep.networks.folders import family_of
from fewstep.networks.gates import GateValue, gate_tensors, gate_values, read_gates
from fewstep.networks.loading import find_checkpoint

NUMBERS = ("alpha", "spread", "beta", "rho", "skip")
HEAD = ("gate", "alpha", "spread", "|beta|", "rho", "skip")
SEEN = ("alpha", "beta", "unit", "cosine", "ratio", "stream", "gradient")
SEEN_HEAD = (
    *("gate", "alpha", "|beta|", "unit / stream", "cosine", "block / stream"),
    *("stream", "gradient"),
)
BAR, ROW, GAP = 260, 18, 16
ALPHA_COLOUR, BETA_COLOUR = "#2563a8", "#b4541a"


def read_values(source: str) -> list[GateValue]:
    """The gates of a pipeline's folder, a checkpoint, or a run's or experiment's folder.

    Raises:
        FewstepError: if there are none.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        _, tensors = read_gates(folder / family_of(folder).part)
    else:
        tensors = gate_tensors(load_denoiser(source).denoiser)
    values = gate_values(tensors)
    if not values:
        raise FewstepError(f"The network of '{source}' has no residual gates.")
    return values


def text(values: Sequence[GateValue]) -> str:
    """A table, a gate a line."""
    rows = [(v.name, *(_number(getattr(v, name)) for name in NUMBERS)) for v in values]
    return _table(HEAD, rows)


def read_seen(source: str) -> list[Row]:
    """What ``callbacks.GateReport`` last wrote down in a run, a line a gate in order of depth.

    Args:
        source: as of :func:`read_values`; nothing is seen of pipelines, and of runs without it.

    Raises:
        FewstepError: if its file is damaged.
    """
    if (Path(source) / "model_index.json").is_file():
        return []
    run = find_checkpoint(source).parent.parent
    if not (run / FOLDER / FILE_NAME).is_file():
        return []
    rows = read_gate_report(run)
    return [row for row in rows if row["update"] == rows[-1]["update"]]


def seen_text(rows: Sequence[Row]) -> str:
    """The same as a table below a line that says when, with more than one role each its own."""
    parts = []
    for role in dict.fromkeys(row["role"] for row in rows):
        own = [row for row in rows if row["role"] == role]
        cells = [(row["gate"], *(_seen_number(row[name]) for name in SEEN)) for row in own]
        head = f"Seen of the {role} in update {own[0]['update']:,}, from its input to its output:"
        parts.append(f"{head}\n{_table(SEEN_HEAD, cells)}")
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that hold something, the first one aligned to the left."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    wide = {i: max(len(line[i]) for line in (head, *rows)) for i in used}
    return "\n".join(
        "  ".join(line[i].ljust(wide[i]) if i == 0 else line[i].rjust(wide[i]) for i in used)
        for line in (head, *rows)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _seen_number(value: float | None) -> str:
    """Gradients are of any size."""
    return "" if value is None else f"{value:.4g}"


def picture(values: Sequence[GateValue], path: Path) -> Path:
    """Draws alpha (or a skip's factor) and the norm of beta as bars, a gate a row.

    A line marks the factor 1, where gates change nothing.
    """
    font = ImageFont.load_default(12)
    label = int(max(font.getlength(value.name) for value in values)) + GAP
    size = (label + 2 * (BAR + GAP) + GAP, ROW * (len(values) + 1) + 2 * GAP)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    factors = [v.alpha if v.alpha is not None else v.skip or 0.0 for v in values]
    betas = [v.beta or 0.0 for v in values]
    tallest, longest = max(1.0, *map(abs, factors)), max(betas, default=0.0) or 1.0
    left, right = label + GAP, label + BAR + 2 * GAP
    pen.text((left, GAP), f"alpha, to {tallest:.2f}", fill=ALPHA_COLOUR, font=font)
    pen.text((right, GAP), f"|beta|, to {longest:.3g}", fill=BETA_COLOUR, font=font)
    for row, (value, factor, beta) in enumerate(zip(values, factors, betas, strict=True), 1):
        top = GAP + row * ROW
        pen.text((GAP // 2, top), value.name, fill="black", font=font)
        for start, share, colour in (
            (left, abs(factor) / tallest, ALPHA_COLOUR),
            (right, beta / longest, BETA_COLOUR),
        ):
            pen.rectangle((start, top + 3, start + round(share * BAR), top + ROW - 4), fill=colour)
    one = left + round(BAR / tallest)
    pen.line((one, GAP + ROW, one, size[1] - GAP), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
