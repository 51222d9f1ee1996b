"""The sensitivity study as a picture; one chart a network and number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from scripts.gates.sensitivity import ALPHAS, Measured, lines_of
from scripts.line_charts import Lines, line_charts

TITLES = {
    "growth": "|z_L| / |z_0|",
    "amplification": "g_0 / g_L",
    "error": "relative error in bfloat16",
    "error_wide": "the same, stream in float32",
}
AXIS = "number of blocks L, each of two branches; at initialisation"


def draw(rows: Sequence[Measured], path: Path) -> None:
    """Draws a chart for each network and number, a line for each start of alpha.

    Charts of one number share an axis, which is why numbers beyond a million are left out; so is
    zero, as the axes are logarithmic.
    """
    networks = list(dict.fromkeys(row.network for row in rows))
    charts = [
        {
            f"{network}: {title}": _lines([row for row in rows if row.network == network], name)
            for network in networks
        }
        for name, title in TITLES.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    line_charts(charts, AXIS).save(path, optimize=True)


def _lines(rows: Sequence[Measured], name: str) -> Lines:
    return {
        f"alpha = {ALPHAS[init]}": [(depth, [value]) for depth, value in points if _placed(value)]
        for init, points in lines_of(rows, name)
    }


def _placed(value: float) -> bool:
    return math.isfinite(value) and 0 < value <= 1e6
