"""The frozen parts of a pipeline beside its denoiser: text encoders and VAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Backbone
from fewstep.errors import FewstepError
from fewstep.networks.folders import family_of
from fewstep.networks.latents import LatentCodec
from fewstep.networks.text import TextEncoding
from lightning_modules.conditioning import in_float32

Cond = dict[str, Tensor]


class Companions:
    """Encodes what a datamodule gives as pixels and prompts, and decodes what a method samples.

    No modules of the method: they are neither trained, averaged, sharded nor saved. Each is loaded
    when it is first needed, so that runs over encoded shards load none until they draw pictures.

    Args:
        folder: of the pipeline.
        dtype: in which precision text encoders and VAE compute.
        offload: whether text encoders leave the GPU after each use; the CPU keeps them throughout.
        tiling, slicing: see :class:`~fewstep.networks.latents.LatentCodec`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        offload: bool,
        tiling: bool = False,
        slicing: bool = False,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.offload = offload
        self.tiling = tiling
        self.slicing = slicing

    @cached_property
    def text(self) -> TextEncoding:
        """The text encoders."""
        return TextEncoding(self.folder, dtype=self.dtype, kept=self.offload)

    @cached_property
    def reads_text(self) -> bool:
        """Whether the denoiser takes text; where it takes none, captions are for a guide."""
        return family_of(self.folder).encode is not None

    @cached_property
    def codec(self) -> LatentCodec:
        """The VAE."""
        return LatentCodec(self.folder, dtype=self.dtype, tiling=self.tiling, slicing=self.slicing)

    @torch.no_grad()
    def conditions(self, prompts: list[str], device: torch.device) -> Cond:
        """What prompts are to the denoiser, each ``(B, ...)`` on ``device``, float32."""
        with torch.autocast(device.type, enabled=False):
            found = self.text.to(device).encode(prompts)
        if self.offload:
            self.text.offload()
        return in_float32(found)

    @torch.no_grad()
    def with_prompts(self, cond: Cond, prompts: list[str] | None, backbone: Backbone) -> Cond:
        """Conditions with the prompts' embeddings; no encoder runs where the data had them."""
        known = backbone.config.get("null", {})
        complete = known and all(name in cond for name in known)
        if prompts is None or complete or not self.reads_text:
            return cond
        device = next(backbone.parameters()).device
        return {**self.conditions(prompts, device), **cond}

    @torch.no_grad()
    def latents(
        self, pixels: Tensor, shape: tuple[int, ...], noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents ``(B, *shape)`` of pixels in [-1, 1]; latents stay as they are.

        Args:
            pixels: ``(B, 3, ...)``.
            shape: of one latent sample.
            noise: makes ``(B, *shape)`` that draws from the VAE's distribution.

        Raises:
            FewstepError: if the pixels do not make latents of that shape.
        """
        if tuple(pixels.shape[1:]) == shape:
            return pixels
        with torch.autocast(pixels.device.type, enabled=False):
            mean, std = self.codec.to(pixels.device).distribution(pixels)
        if tuple(mean.shape[1:]) != shape:
            raise FewstepError(
                f"Samples of shape {tuple(pixels.shape[1:])} make latents {tuple(mean.shape[1:])}, "
                f"and the network takes {shape}. Give the data's `sample` the size (and frames) of "
                "the teacher, or the teacher theirs: lightning_modules.Pretrained has `size` and "
                "`frames`."
            )
        return mean if std is None else mean + std * noise()

    def decoded(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of latents ``(B, C, ...)``, a sample at a time.

        In the VAE's own precision, also within autocast: samples and records are decoded alike.
        """
        codec = self.codec.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([codec.decode(one) for one in latents.split(1)])

    def pixel_frames(self, latents: int) -> int:
        """Frames in pixels of so many in latents: a VAE for videos makes fewer of them."""
        if not self.codec.encodes_videos:
            return latents
        return (latents - 1) * self.codec.factors[0] + 1

    def release(self) -> None:
        """Puts what is loaded on the CPU until it is needed again."""
        loaded = vars(self)
        if "text" in loaded:
            self.text.offload()
        if "codec" in loaded:
            self.codec.to("cpu")
