"""Pixels on their way into a network: 8 bits, three colours, frames, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fewstep.errors import FewstepError
from fewstep.metrics.base import to_uint8
from fewstep.metrics.weights import model_folder, model_sha256
from fewstep.seeding import torch_generator

RESAMPLING = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}  # Pillow's numbers


def check_pictures(pixels: Tensor) -> None:
    """Makes sure that samples can be looked at.

    Raises:
        FewstepError: for anything else than images or videos of one or three channels.
    """
    if pixels.ndim not in (4, 5) or pixels.shape[1] not in (1, 3):
        raise FewstepError(
            "This metric looks at images (B, C, H, W) or videos (B, C, F, H, W) of one or three "
            f"channels; the samples are {tuple(pixels.shape)}."
        )


def colours(pixels: Tensor) -> Tensor:
    """Images or videos in [-1, 1] as 8-bit values of three colours; grey ones are repeated.

    Raises:
        FewstepError: as :func:`check_pictures`.
    """
    check_pictures(pixels)
    return to_uint8(pixels).expand(-1, 3, *pixels.shape[2:])


def one_by_one(pixels: Tensor) -> Tensor:
    """Images as they are, videos ``(B, C, F, H, W)`` as frames ``(B F, C, H, W)``."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)


def each_frame(pixels: Tensor, network: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
    """A network's ``(B, ...)`` of images or ``(B, F, ...)`` of a video's frames.

    Args:
        pixels: images or videos of any number type.
        network: takes images ``(N, C, H, W)``.
        batch_size: images at once.
    """
    found = torch.cat([network(part) for part in one_by_one(pixels).split(batch_size)])
    return found if pixels.ndim == 4 else found.unflatten(0, (len(pixels), pixels.shape[2]))


def cut_clip(video: Tensor, length: int, stride: int) -> Tensor:
    """The first ``length`` frames of videos ``(B, C, F, H, W)``, every ``stride``-th.

    Raises:
        FewstepError: for images, and for videos with too few frames.
    """
    if video.ndim != 5:
        raise FewstepError("This metric looks at videos; the samples are images.")
    needed = (length - 1) * stride + 1
    if video.shape[2] < needed:
        raise FewstepError(
            f"The clips have {video.shape[2]} frames; {length} at a stride of {stride} take "
            f"{needed}. Make longer clips, or lower 'clip_length' or 'stride'."
        )
    return video[:, :, :needed:stride]


def shuffle_frames(video: Tensor, numbers: Tensor) -> Tensor:
    """Videos ``(B, C, F, H, W)`` with their frames in an order drawn from each one's number."""
    count = video.shape[2]
    orders = [
        torch.randperm(count, generator=torch_generator(0, "shuffled frames", number))
        for number in numbers.tolist()
    ]
    pairs = zip(video, orders, strict=True)
    return torch.stack([clip[:, order.to(clip.device)] for clip, order in pairs])


def centre_square(pixels: Tensor, resolution: int) -> Tensor:
    """8-bit images or videos, cropped to the middle square and resized (bilinear, antialiased)."""
    square = centre_crop(pixels, *[min(pixels.shape[-2:])] * 2)
    return resized(square, [resolution, resolution], InterpolationMode.BILINEAR)


def centre_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle of pictures, padded with zeros where they are smaller.

    An odd number of pixels left over loses one more at the end, as in transformers; torchvision
    rounds to even.
    """
    top, left = (
        max(n - m, 0) // 2 for n, m in zip(pixels.shape[-2:], (height, width), strict=True)
    )
    return TF.center_crop(pixels[..., top : top + height, left : left + width], [height, width])


def resized(pixels: Tensor, size: list[int], mode: InterpolationMode) -> Tensor:
    """Pixels ``(..., C, H, W)`` or ``(B, C, F, H, W)`` of a size, antialiased, of the same type."""
    if list(pixels.shape[-2:]) == size:
        return pixels
    return TF.resize(pixels, size, interpolation=mode, antialias=True)


@dataclass(frozen=True)
class Preparation:
    """What transformers' image processors do, on tensors.

    Attributes:
        shortest_edge: side to resize to, or None where ``size`` is given.
        size: height and width to resize to, or None.
        resample: Pillow's number of the filter; always antialiased.
        crop: height and width of the middle that is kept; None keeps all.
        mean, std: of the normalised colours, for pixels in [0, 1].
    """

    shortest_edge: int | None
    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> Preparation:
        """As a model folder's preprocessor_config.json says.

        Raises:
            FewstepError: if the file is missing or asks for something else.
        """
        path = folder / "preprocessor_config.json"
        try:
            options = json.loads(path.read_text())
            for step in ("do_resize", "do_rescale", "do_normalize"):
                if not options.get(step, True):
                    raise ValueError(f"{step} is off")
            size = options["size"]
            edge = size if isinstance(size, int) else size.get("shortest_edge")
            crop = options.get("crop_size") if options.get("do_center_crop", True) else None
            preparation = cls(
                shortest_edge=edge,
                size=None if edge else (size["height"], size["width"]),
                resample=options["resample"],
                crop=None if crop is None else _pair(crop),
                mean=tuple(options["image_mean"]),
                std=tuple(options["image_std"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FewstepError(
                f"'{path}' does not say how to resize and normalise pictures "
                f"({type(error).__name__}: {error}). Get the whole model folder again."
            ) from error
        if preparation.resample not in RESAMPLING:
            raise FewstepError(f"'{path}' asks for an unknown resampling {preparation.resample}.")
        return preparation

    def __call__(self, pixels: Tensor) -> Tensor:
        """8-bit images ``(N, 3, H, W)`` as the network takes them, float32.

        The resized picture is 8-bit too, as it is in the original processors.
        """
        height, width = pixels.shape[-2:]
        target = list(self.size or (height, width))
        if edge := self.shortest_edge:
            long = int(edge * max(height, width) / min(height, width))
            target = [edge, long] if height <= width else [long, edge]
        pixels = resized(pixels, target, RESAMPLING[self.resample])
        if self.crop is not None:
            pixels = centre_crop(pixels, *self.crop)
        mean, std = (pixels.new_tensor(v, dtype=torch.float32) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]

    def protocol(self) -> dict[str, Any]:
        """All of it in plain values."""
        plain = {name: value for name, value in asdict(self).items() if value is not None}
        values = {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items()}
        return {**values, "resample": RESAMPLING[self.resample].value, "antialias": True}


def check_model(model: str) -> None:
    """Makes sure that a transformers model for pictures is there as a whole.

    Raises:
        FewstepError: if its folder, weights or preprocessor_config.json are missing.
    """
    folder = model_folder(model)
    model_sha256(folder)
    Preparation.read(folder)


def _pair(size: int | dict[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
