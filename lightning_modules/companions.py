"""The frozen parts of a pipeline beside its denoiser: text encoders and VAE."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewstep.contracts import Batch
from fewstep.networks.latents import LatentCodec
from fewstep.networks.text import TextEncoding

Cond = dict[str, Tensor]


class Companions:
    """Encodes what a datamodule gives as pixels and prompts, and decodes what a method samples.

    No modules of the method: they are neither trained, averaged, sharded nor saved. Each is loaded
    when it is first needed, so that runs over encoded shards load none until they draw pictures.

    Args:
        folder: of the pipeline.
        dtype: in which precision text encoders and VAE compute.
        offload: whether text encoders go back to the CPU after each use.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, offload: bool) -> None:
        self.folder = folder
        self.dtype = dtype
        self.offload = offload

    @cached_property
    def text(self) -> TextEncoding:
        """The text encoders."""
        return TextEncoding(self.folder, dtype=self.dtype)

    @cached_property
    def codec(self) -> LatentCodec:
        """The VAE."""
        return LatentCodec(self.folder, dtype=self.dtype)

    @torch.no_grad()
    def conditions(self, prompts: list[str], device: torch.device) -> Cond:
        """What prompts are to the denoiser, each ``(B, ...)`` on ``device``, float32."""
        with torch.autocast(device.type, enabled=False):
            found = self.text.to(device).encode(prompts)
        if self.offload:
            self.text.offload()
        return {n: v.float() if v.is_floating_point() else v for n, v in found.items()}

    @torch.no_grad()
    def encoded(self, batch: Batch, shape: tuple[int, ...], noise: Tensor | None) -> Batch:
        """A batch with latents for pixels and embeddings for prompts; what is encoded stays.

        Args:
            batch: of pixels in [-1, 1] or latents, with prompts or embeddings.
            shape: of one latent sample.
            noise: ``(B, *shape)``, draws from the VAE's distribution; None takes its mean.

        Raises:
            FewstepError: if the pixels do not make latents of that shape.
        """
        sample, cond = batch["sample"], batch["cond"]
        if tuple(sample.shape[1:]) != shape:
            with torch.autocast(sample.device.type, enabled=False):
                mean, std = self.codec.to(sample.device).distribution(sample)
            sample = mean if noise is None or std is None else mean + std * noise
        if "prompt" in batch:
            cond = {**self.conditions(batch["prompt"], sample.device), **cond}
        return {**batch, "sample": sample, "cond": cond}

    def decoded(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of latents ``(B, C, ...)``, a sample at a time.

        In the VAE's own precision, also within autocast: samples and records are decoded alike.
        """
        codec = self.codec.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([codec.decode(one) for one in latents.split(1)])

    def release(self) -> None:
        """Puts what is loaded on the CPU until it is needed again."""
        loaded = vars(self)
        if "text" in loaded:
            self.text.offload()
        if "codec" in loaded:
            self.codec.to("cpu")
