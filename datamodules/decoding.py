"""From the bytes of a record to a sample; never a pickle, never a shell."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.shards import Record, ShardReader

MAX_IMAGE_PIXELS = 64 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Sample:
    """One decoded record: pixels ``(C, H, W)`` uint8, class label or None, key."""

    pixels: Tensor
    label: int | None
    key: str


@dataclass(frozen=True)
class Skipped:
    """A record that could not be decoded, and why."""

    name: str
    reason: str


def decode_image(data: bytes, channels: int, size: int | None) -> Tensor:
    """Decodes to ``(C, H, W)`` uint8, resized and centre-cropped to ``size`` if it differs.

    Raises:
        ValueError, OSError: for damaged, unsupported or absurdly large images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        shape = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(shape, Image.Resampling.LANCZOS)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class ImageDecoder:
    """Decodes labelled images.

    Args:
        channels: 1 or 3.
        size: side of the square result; None keeps images as they are.
        label_key: extension of the class label (an integer as text); None for unlabelled data.
        image_keys: extensions of the image, the first present is taken.
    """

    def __init__(
        self,
        channels: int,
        size: int | None,
        label_key: str | None = "cls",
        image_keys: tuple[str, ...] = ("png", "jpg", "jpeg", "webp"),
    ) -> None:
        self.channels = channels
        self.size = size
        self.label_key = label_key
        self.image_keys = image_keys
        self.reader = ShardReader()

    def __call__(self, record: Record) -> Sample | Skipped:
        """Decodes one record; what is wrong with it comes back as a :class:`Skipped`."""
        try:
            key = next((k for k in self.image_keys if k in record.parts), None)
            if key is None:
                raise ValueError(f"it has no image, only {', '.join(record.parts)}")
            pixels = decode_image(self.reader.read(record, key), self.channels, self.size)
            label = None
            if self.label_key is not None:
                if self.label_key not in record.parts:
                    raise ValueError(f"it has no '{self.label_key}' part")
                label = int(self.reader.read(record, self.label_key))
        except (ValueError, OSError, SyntaxError, Warning) as error:
            return Skipped(record.name, str(error).split("\n")[0])
        return Sample(pixels, label, record.key)
