"""The mark on watermarked moving digits: data are made with it, metrics look for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MARK_OPACITY = 0.4
MARK_STRIPES = 4  # that a frame's side would hold


def watermark(size: int) -> npt.NDArray[np.float64]:
    """Opacity of the white mark in each pixel, ``(size, size)``: soft stripes at the lower right.

    Where it is zero nothing of the mark is seen, so sharpness is best measured there.
    """
    row, column = (np.mgrid[:size, :size] + 0.5) / size
    stripes = 0.5 - 0.5 * np.cos(2 * np.pi * (row + column) * MARK_STRIPES)
    # Fading out at its borders, the mark is as soft as the blurred digits below it.
    down, across = (np.clip((row - 0.6) / 0.35, 0, 1), np.clip((column - 0.5) / 0.45, 0, 1))
    return MARK_OPACITY * stripes * 4 * np.sqrt(down * (1 - down) * across * (1 - across))
