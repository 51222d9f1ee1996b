"""Frozen networks through which a discriminator looks at frames."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.frames.geometry import area_resized, crop
from fewstep.networks.frames.models import find_model, load_frozen, read_config, weights_sha256
from fewstep.seeding import torch_generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
COLOURS = 3
# Width, blocks and heads of the released networks, with patches of 14 for images of 518 pixels.
DINOV2 = {
    "facebook/dinov2-small": (384, 12, 6),
    "facebook/dinov2-base": (768, 12, 12),
    "facebook/dinov2-large": (1024, 24, 16),
}


class FrozenFeatures(nn.Module, ABC):
    """What a discriminator's heads look at: tokens of several levels of a frozen network.

    Made from a config at no cost; :meth:`load` then gets the weights. A method holds it as a frozen
    role, so that it moves with the method and is neither trained nor saved. It is always in eval
    mode, and an image's features depend on that image alone.

    Attributes:
        num_uniforms: random numbers an image that :meth:`prepare` takes.
    """

    num_uniforms: int = 0

    @property
    @abstractmethod
    def channels(self) -> list[int]:
        """Channels of each level's tokens; known before :meth:`load`."""

    @abstractmethod
    def load(self) -> None:
        """Gets the weights, once.

        Raises:
            FewstepError: if they are missing or damaged.
        """

    def outline(self) -> str | None:
        """Builds the network as large as it is, without its weights; for plans.

        Returns:
            what had to be assumed, in a sentence.

        Raises:
            FewstepError: if nothing says how large it is.
        """
        self.load()
        return None

    @abstractmethod
    def origin(self) -> dict[str, str]:
        """Where the network came from, for the record of a run."""

    @abstractmethod
    def prepare(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Images ``(N, C, H, W)`` in [-1, 1] as the network takes them.

        Args:
            uniforms: ``(N, num_uniforms)`` in [0, 1); None does nothing at random.
        """

    @abstractmethod
    def tokens(self, prepared: Tensor) -> list[Tensor]:
        """Tokens ``(N, L, C)`` of each level, of what :meth:`prepare` gave."""

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> list[Tensor]:
        """Tokens ``(N, L, C)`` of each level, with gradient to the images.

        Args:
            images: ``(N, 3, H, W)`` or grey ``(N, 1, H, W)``, in [-1, 1].
            uniforms: see :meth:`prepare`.
        """
        return self.tokens(self.prepare(images, uniforms))

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)


def coloured(images: Tensor, channels: int = COLOURS) -> Tensor:
    """Images in as many channels as a network takes: grey ones are repeated.

    Raises:
        FewstepError: if they have another number of channels.
    """
    if images.shape[1] not in (1, channels):
        raise FewstepError(
            f"The frames have {images.shape[1]} channels and the network that looks at them takes "
            f"{channels}. Is the sample not decoded?"
        )
    return images.expand(-1, channels, -1, -1)


class DINOv2Features(FrozenFeatures):
    """DINOv2's patch tokens after some of its blocks, as StyleGAN-T's discriminator sees them.

    Each level goes through the last normalisation; the class token is left out. An image larger
    than ``size`` is resized to it or, with chance ``crop_share``, cropped to it.

    Args:
        source: a folder of the transformers model, or its name in the Hugging Face cache; nothing
            is downloaded.
        layers: the blocks, counted from 0 (MCM: of a ViT-S/14 these).
        size: height and width of what the network sees; a multiple of its patches.
        crop_share: share of images that are cropped.
    """

    num_uniforms = 3  # whether to crop, and where

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        source: str = "facebook/dinov2-small",
        layers: Sequence[int] = (2, 5, 8, 11),
        size: int = 224,
        crop_share: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 <= crop_share <= 1:
            raise FewstepError(f"crop_share is a share of images, from 0 to 1, not {crop_share}.")
        self.source = source
        self.layers = list(layers)
        self.size = size
        self.crop_share = crop_share
        self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), persistent=False)
        self.network: Any = None

    @cached_property
    def _found(self) -> tuple[Path, dict[str, Any]]:
        """Folder and configuration."""
        folder = find_model(self.source, "source")
        config = read_config(folder, ("dinov2",))
        self._check(folder, config)
        return folder, config

    def _check(self, folder: Path, config: dict[str, Any]) -> None:
        blocks, patch = int(config["num_hidden_layers"]), int(config["patch_size"])
        wrong = [layer for layer in self.layers if not 0 <= layer < blocks]
        if wrong or not self.layers:
            raise FewstepError(
                f"'{folder}' has the blocks 0 to {blocks - 1}; layers: {self.layers} names "
                f"{'others' if wrong else 'none'}."
            )
        if self.size % patch:
            raise FewstepError(f"'{folder}' has patches of {patch}, which do not tile {self.size}.")

    @property
    def channels(self) -> list[int]:
        return [int(self._found[1]["hidden_size"])] * len(self.layers)

    def load(self) -> None:
        if self.network is None:
            folder = self._found[0]
            from transformers import Dinov2Model  # noqa: PLC0415 - slow, and an extra

            self.network = load_frozen(Dinov2Model, folder)

    def outline(self) -> str | None:
        note = None
        try:
            find_model(self.source, "source")
        except FewstepError:
            if self.source not in DINOV2 or importlib.util.find_spec("transformers") is None:
                raise
            self._found = Path(self.source), _released(*DINOV2[self.source])
            self._check(*self._found)
            note = f"'{self.source}' is not here yet: its sizes are those of the released network."
        from transformers import Dinov2Config, Dinov2Model  # noqa: PLC0415

        self.network = Dinov2Model(Dinov2Config(**self._found[1])).requires_grad_(False).eval()
        return note

    def origin(self) -> dict[str, str]:
        return {"source": self.source, "sha256": weights_sha256(self._found[0])}

    def prepare(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """``(N, 3, size, size)``, normalised as ImageNet."""
        pixels = (coloured(images).to(self.mean.dtype) + 1) / 2
        seen = area_resized(pixels, self.size)
        if uniforms is not None and min(pixels.shape[2:]) >= self.size:
            cropped = crop(pixels, self.size, uniforms[:, 1:])
            seen = torch.where(uniforms[:, :1, None, None] < self.crop_share, cropped, seen)
        return (seen - self.mean) / self.std

    def tokens(self, prepared: Tensor) -> list[Tensor]:
        assert self.network is not None, "load() comes first"
        hidden = self.network.embeddings(prepared)
        found: dict[int, Tensor] = {}
        for number, block in enumerate(self.network.encoder.layer[: max(self.layers) + 1]):
            hidden = block(hidden)
            if number in self.layers:
                found[number] = self.network.layernorm(hidden)[:, 1:]
        return [found[layer] for layer in self.layers]


def _released(width: int, blocks: int, heads: int) -> dict[str, Any]:
    """A configuration of DINOv2's."""
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "patch_size": 14,
        "image_size": 518,
    }


class ConvolutionFeatures(FrozenFeatures):
    """A convolutional network that was never trained: its weights are *random*, fixed by a seed.

    For small data and tests, where no pretrained network fits or can be had. It sees edges, colours
    and texture and knows nothing of what pictures show; results with it say so.

    Args:
        seed: of the weights, which are the same on every machine.
        widths: channels of each level; each level is half as high and wide as the one before.
        in_channels: of the images; grey images are repeated.
        kernel_size: of the convolutions.
    """

    def __init__(
        self,
        seed: int = 0,
        widths: Sequence[int] = (32, 64, 128),
        in_channels: int = COLOURS,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if not widths:
            raise FewstepError("ConvolutionFeatures need at least one level; see widths.")
        self.seed = seed
        self.in_channels = in_channels
        generator = torch_generator(seed, "frozen-features")
        inputs = [in_channels, *widths[:-1]]
        self.levels = nn.ModuleList(
            _random_convolution(i, o, kernel_size, generator)
            for i, o in zip(inputs, widths, strict=True)
        )
        self.requires_grad_(False).eval()

    @property
    def channels(self) -> list[int]:
        return [int(level.out_channels) for level in self.levels]  # type: ignore[arg-type]

    def load(self) -> None:
        """Nothing to get."""

    def origin(self) -> dict[str, str]:
        return {"source": f"random convolutions {self.channels}, seed {self.seed}"}

    def prepare(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """The images as they are, in ``in_channels``."""
        return coloured(images, self.in_channels)

    def tokens(self, prepared: Tensor) -> list[Tensor]:
        found, hidden = [], prepared
        for level in self.levels:
            hidden = F.leaky_relu(level(hidden), 0.2)
            found.append(hidden.flatten(2).mT)
        return found


def _random_convolution(
    inputs: int, outputs: int, kernel_size: int, generator: torch.Generator
) -> nn.Conv2d:
    """One that halves height and width and keeps the size of numbers, about.

    Uniform, since the normal numbers of different machines differ in their last bits.
    """
    options = {"stride": 2, "padding": kernel_size // 2}
    layer: Any = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel_size, **options)
    bound = math.sqrt(3 * 2 / (inputs * kernel_size**2))
    shape = (outputs, inputs, kernel_size, kernel_size)
    layer.weight = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
    layer.bias = nn.Parameter(torch.rand(outputs, generator=generator) - 0.5)
    return layer
