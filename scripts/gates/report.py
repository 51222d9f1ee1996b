"""What gates have become, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fewstep.errors import FewstepError
from fewstep.networks import load_denoiser
from fewstep.networks.folders import family_of
from fewstep.networks.gates import GateValue, gate_tensors, gate_values, read_gates

NUMBERS = ("alpha", "spread", "beta", "rho", "skip")
HEAD = ("gate", "alpha", "spread", "|beta|", "rho", "skip")
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
    lines = [HEAD, *((v.name, *(_number(getattr(v, name)) for name in NUMBERS)) for v in values)]
    used = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    wide = {i: max(len(line[i]) for line in lines) for i in used}
    return "\n".join(
        "  ".join(line[i].ljust(wide[i]) if i == 0 else line[i].rjust(wide[i]) for i in used)
        for line in lines
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


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
