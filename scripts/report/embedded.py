"""Pictures and clips as data inside the page, within a budget."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence

LARGEST_SIDE = 1600
BYTES_PER_PIXEL = 0.2
"""About what WebP takes for a pixel of a detailed picture."""

FEWEST_BYTES = 12_000
"""Of a picture one can still judge; rather than smaller ones, there will be fewer."""


@dataclass(frozen=True)
class Embedded:
    """A picture inside the page.

    Attributes:
        key: what its data are found by.
        frames: more than one for a clip.
        shrunk: whether it is smaller, or coarser, than its file.
    """

    key: str
    width: int
    height: int
    frames: int
    shrunk: bool


class Album:
    """Every picture of a page, each kept once.

    Args:
        files: pictures and clips.
        budget: bytes of all together, before base64 adds a third.
    """

    def __init__(self, files: Sequence[Path], budget: int) -> None:
        self.data: dict[str, str] = {}
        self.found: dict[Path, Embedded] = {}
        self.damaged: dict[Path, str] = {}
        allowed = allowance([path.stat().st_size for path in files], budget)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda path: self._add(path, allowed), files))

    def _add(self, path: Path, allowed: float) -> None:
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                frames = getattr(image, "n_frames", 1)
                kind = (image.format or "").lower()
                shrunk = len(content) > allowed or max(image.size) > 2 * LARGEST_SIDE
                if shrunk or kind not in ("png", "webp", "gif"):
                    content, size = shrink(image, allowed)
                    kind = "webp"
                else:
                    size = image.size
        except (OSError, ValueError, SyntaxError) as error:
            self.damaged[path] = str(error)  # which of these it raises is Pillow's choice
            return
        key = hashlib.sha256(content).hexdigest()[:16]
        self.data[key] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        self.found[path] = Embedded(key, *size, frames, shrunk)

    @property
    def size(self) -> int:
        """Characters of all data."""
        return sum(len(url) for url in self.data.values())


def allowance(sizes: Sequence[int], budget: int) -> float:
    """The bytes from which a file must be made smaller, so that all together keep a budget.

    Files below an equal share leave what they do not need to the others.
    """
    left, ordered = float(budget), sorted(sizes)
    for place, size in enumerate(ordered):
        share = left / (len(ordered) - place)
        if size > share:
            return share
        left -= size
    return math.inf


def shrink(image: Image.Image, allowed: float) -> tuple[bytes, tuple[int, int]]:
    """A WebP picture, or clip, of about a given number of bytes, and its size in pixels."""
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    duration = image.info.get("duration", 125)
    width, height = image.size
    pixels = allowed / (BYTES_PER_PIXEL * len(frames)) if math.isfinite(allowed) else math.inf
    scale = min(1.0, LARGEST_SIDE / max(width, height), math.sqrt(pixels / (width * height)))
    for _ in range(4):
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
        buffer = io.BytesIO()
        more = {"save_all": True, "append_images": small[1:], "duration": duration, "loop": 0}
        small[0].save(buffer, "WEBP", quality=78, method=2, **(more if small[1:] else {}))
        if buffer.tell() <= allowed or max(size) < 16:
            break
        scale *= 0.9 * math.sqrt(allowed / buffer.tell())
    return buffer.getvalue(), size


def thinned(stages: Sequence[int], most: int) -> list[int]:
    """At most some of a row of stages of training, the first and the last among them."""
    if len(stages) <= most:
        return list(stages)
    if most < 2:
        return list(stages[-1:])
    places = {round(i * (len(stages) - 1) / (most - 1)) for i in range(most)}
    return [stages[i] for i in sorted(places)]
