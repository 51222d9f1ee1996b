"""A diffusers pipeline's VAE and text encoders, as the encoding of shards needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks import folders
from fewstep.networks.folders import TEXT_MODELS, native_size, pipeline_name
from fewstep.networks.latents import LatentCodec, LatentSpace
from fewstep.networks.text import TextEncoding

LatentKind = Literal["sample", "mean", "moments"]
Conditions = dict[str, Tensor]

__all__ = ["Conditions", "Encoder", "LatentKind", "LatentSpace", "native_size", "pipeline_name"]


class Encoder:
    """Encodes pixels and captions with the parts of a diffusers pipeline.

    Args:
        folder: the pipeline's, as ``save_pretrained`` writes it.
        device: where to compute.
        dtype: in which precision to compute.
        text: whether the text encoders are needed.

    Attributes:
        name: the pipeline's class.

    Raises:
        FewstepError: if the folder holds no pipeline, or none that is supported.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        text: bool = True,
    ) -> None:
        self.name = pipeline_name(folder)
        self.codec = LatentCodec(folder, device, dtype)
        self._text = TextEncoding(folder, device, dtype) if text else None

    def check(self, size: tuple[int, int], frames: int | None) -> None:
        """Makes sure that the VAE can encode such samples whole.

        Raises:
            FewstepError: if it cannot.
        """
        every, factor = self.codec.factors
        if size[0] % factor or size[1] % factor:
            raise FewstepError(f"--size must be multiples of {factor} for this VAE, not {size}.")
        if frames is not None and (frames - 1) % every:
            near = frames - (frames - 1) % every
            raise FewstepError(
                f"This VAE encodes 1 + {every} n frames; use --frames {near} or {near + every}."
            )

    def latents(
        self, pixels: Tensor, kind: LatentKind, noises: Callable[[Tensor], Tensor]
    ) -> Conditions:
        """Encodes pixels.

        Args:
            pixels: ``(B, C, H, W)`` or ``(B, C, F, H, W)`` in [-1, 1]. Frames are encoded one by
                one where the VAE is one for images.
            kind: what to give.
            noises: makes the noise for latents of a given tensor's shape.

        Returns:
            ``latent``, or ``mean`` and ``std``, as a network sees them: float32 ``(B, C, ...)``.
        """
        mean, std = self.codec.distribution(pixels)
        if kind == "mean" or (std is None and kind == "sample"):
            return {"latent": mean}
        if std is None:
            raise FewstepError(
                "This VAE gives one latent and no distribution: use --latents mean, not moments."
            )
        if kind == "moments":
            return {"mean": mean, "std": std}
        return {"latent": mean + std * noises(mean)}

    @property
    def _words(self) -> TextEncoding:
        assert self._text is not None, "This encoder was made without text."
        return self._text

    def text(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of prompts, each ``(B, ...)``, by the denoising network's argument names."""
        return self._words.encode(prompts)

    def empty(self) -> Conditions:
        """What the pipeline gives its unconditional branch, each ``(1, ...)``."""
        return self._words.null()


def weights_hash(folder: Path, text: bool) -> str:
    """A hash of all files of the parts that encode."""
    return folders.weights_hash(folder, ("vae", *(TEXT_MODELS if text else ())))
