"""Images: decoded from an allow-list of formats, resized, cropped and flipped in one pass."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datamodules.fields.base import Decoded, Field, Random
from datamodules.index import Read, Shape, ShardIndex

FORMATS = ("PNG", "JPEG", "WEBP")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class _Cut(NamedTuple):
    """What of an image is taken: its left and top edge, and how many of its pixels make one."""

    left: float = 0.0
    top: float = 0.0
    scale: float = 1.0


class Images(Field):
    """Images as ``(C, H, W)`` uint8, in the end float32 in [-1, 1].

    Args:
        size: of the result: a side, or height and width. The image is scaled until it covers it and
            cropped; None keeps images as they are.
        channels: 1 (grey) or 3 (RGB).
        crop: where training crops: in the ``center`` or at ``random``; evaluation, the centre.
        min_scale: with random crops, the least share of the largest crop's area that is taken.
        flip: whether training mirrors half of the images.
        buckets: sizes ``[height, width]`` instead of one ``size``. Batches are made of images that
            are nearest in aspect to the same one; a mixed batch takes the most frequent.
        as_video: whether to give a video of one frame, ``(C, 1, H, W)``.
        max_pixels: larger images are refused before they are decoded.
        time_ids: whether batches tell networks such as SDXL's what each image is cut from, as the
            condition ``time_ids (B, 6)``, see :func:`time_ids`. Samples are then still asked for
            as whole images, as networks take it to be where nothing is said. For random crops,
            which a network that is not told of them learns to make.
        keys: see :class:`Field`.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        channels: int = 3,
        crop: Literal["center", "random"] = "center",
        min_scale: float = 1.0,
        flip: bool = False,
        buckets: list[tuple[int, int]] | None = None,
        as_video: bool = False,
        max_pixels: int = 64 * 2**20,
        time_ids: bool = False,
        keys: Sequence[str] = EXTENSIONS,
    ) -> None:
        super().__init__(keys)
        self.size: Shape | None = (size, size) if isinstance(size, int) else size
        self.channels = channels
        self.crop = crop
        self.min_scale = min_scale
        self.flip = flip
        self.sizes = [(int(h), int(w)) for h, w in buckets] if buckets else None
        self.as_video = as_video
        self.max_pixels = max_pixels
        self._time_ids = time_ids  # private, as no result's pixels depend on it

    # ------------------------------------------------------------------ buckets

    def buckets(self, index: ShardIndex) -> npt.NDArray[np.int64] | None:
        """The bucket whose aspect is nearest, by the ratio, to each image's."""
        if self.sizes is None:
            return None
        assert index.shapes is not None
        return nearest_aspect(index.shapes, self.sizes)

    def for_batch(self, shapes: list[Shape] | None) -> Images:
        """The field with the most frequent bucket of these images as its size."""
        if self.sizes is None or shapes is None:
            return self
        numbers = nearest_aspect(np.asarray(shapes), self.sizes)
        fitted = object.__new__(type(self))
        fitted.__dict__.update(self.__dict__, size=self.sizes[int(np.bincount(numbers).argmax())])
        return fitted

    # ------------------------------------------------------------------ decoding

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes one image.

        Raises:
            ValueError, OSError: for damaged, unsupported or absurdly large images.
        """
        image = _open(data)
        if image.width * image.height > self.max_pixels:
            raise ValueError(
                f"{image.width} x {image.height} pixels are more than max_pixels: {self.max_pixels}"
            )
        image = image.convert("L" if self.channels == 1 else "RGB")
        draws = self.crop == "random" or self.flip
        generator = random() if random is not None and draws else None
        original, cut = (image.height, image.width), _Cut()
        size = self.size or original
        if size != original:
            cut = self._cut(original, size, generator)
            image = _taken(image, size, cut)
        pixels = np.array(image)
        mirrored = generator is not None and self.flip and bool(generator.random() < 0.5)
        if mirrored:
            pixels = pixels[:, ::-1]
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        result = torch.from_numpy(np.ascontiguousarray(pixels))
        told = {"time_ids": time_ids(original, size, cut, mirrored)} if self._time_ids else {}
        return Decoded(result[:, None] if self.as_video else result, cond=told)

    def _cut(self, original: Shape, size: Shape, generator: np.random.Generator | None) -> _Cut:
        """A part of the size's aspect, at the centre or wherever the generator says."""
        scale = min(original[0] / size[0], original[1] / size[1])
        across = down = 0.5
        if generator is not None and self.crop == "random":
            scale *= math.sqrt(generator.uniform(self.min_scale, 1))
            across, down = generator.random(2)
        top, left = original[0] - size[0] * scale, original[1] - size[1] * scale
        return _Cut(left * across, top * down, scale)

    def finish(self, values: Tensor) -> Tensor:
        """From 0 .. 255 to [-1, 1]."""
        return values.float() / 127.5 - 1


def _taken(image: Image.Image, size: Shape, cut: _Cut) -> Image.Image:
    """Crops and resizes, at once and without rounding the crop."""
    (height, width), (left, top, scale) = size, cut
    box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def time_ids(original: Shape, size: Shape, cut: _Cut, mirrored: bool = False) -> Tensor:
    """What SDXL is told of an image (Podell et al. 2023, section 2.2), ``(6,)`` integers.

    Height and width of the file's image; top and left edge of the crop, in pixels of the whole
    image after it was resized and, where it is, mirrored; height and width of the result.
    """
    top, left = cut.top / cut.scale, cut.left / cut.scale
    if mirrored:
        left = original[1] / cut.scale - left - size[1]
    return torch.tensor([*original, round(top), round(left), *size])


def nearest_aspect(shapes: npt.NDArray[np.int32], sizes: Sequence[Shape]) -> npt.NDArray[np.int64]:
    """Which of ``sizes`` is nearest in log aspect to each of ``shapes`` ``(n, 2)``, both (h, w)."""
    known = np.maximum(np.asarray(shapes, dtype=np.float64), 1)
    offered = np.asarray(sizes, dtype=np.float64)
    distance = np.log(known[:, :1] / known[:, 1:]) - np.log(offered[:, 0] / offered[:, 1])
    return np.abs(distance).argmin(axis=1)


def image_shape(extension: str, read: Read) -> Shape | None:
    """Height and width from an image's first bytes; None if it is no readable image."""
    kind = extension.rpartition(".")[2]
    if kind not in EXTENSIONS:
        return None
    try:
        # A JPEG may have much metadata before its dimensions; a WebP is opened as a whole.
        image = _open(read(2**30 if kind == "webp" else 64 * 2**10))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return image.height, image.width


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"it is no {', '.join(FORMATS)} image, or a truncated one") from error
