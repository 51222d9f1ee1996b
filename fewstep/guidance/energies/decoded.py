"""Energies of latents: those of the pixels that a decoder makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target


class Decoder(Protocol):
    """From latents as the denoiser sees them to pixels in [-1, 1], with gradient."""

    def pixels(self, latents: Tensor, checkpointed: bool = False) -> Tensor:
        """Pixels ``(B, 3, ...)`` of latents ``(B, C, ...)``, not clamped."""

    def decode_frames(self, latents: Tensor, frames: Tensor, checkpointed: bool = False) -> Tensor:
        """Frames ``(B, n)`` of videos ``(B, C, F, h, w)`` as pixels ``(B, n, 3, H, W)``."""


@dataclass(frozen=True, eq=False)
class Decoded(Energy):
    """An energy of pixels, for latents.

    The gradient passes through the decoder. Random views of guidance are made of the pixels, after
    each sample was decoded once; noisy copies are of latents, and each is decoded.

    Args:
        energy: of pixels in [-1, 1], pictures ``(N, 3, H, W)`` or videos ``(N, 3, F, H, W)``.
        decoder: such as a :class:`fewstep.networks.latents.LatentCodec`, which knows the latents'
            scaling, and may decode in tiles. Pixels are not clamped: clamped ones would have no
            gradient.
        frames: of a video, which ones to decode, counted in pixels; all by default.
        checkpointed: keeps only the decoder's input for the backward pass and computes the rest
            once more.
        at_once: samples decoded at a time; all by default. With ``checkpointed`` this bounds the
            memory, without it changes nothing in it.
    """

    energy: Energy
    decoder: Decoder
    frames: Sequence[int] | None = None
    checkpointed: bool = False
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise FewstepError(f"Decoded takes one sample at a time or more, not {self.at_once}.")
        if self.frames is not None and not self.frames:
            raise FewstepError("Decoded with frames: [] sees nothing; leave frames out for all.")

    @property
    def minimum(self) -> float | None:
        return self.energy.minimum

    def staged(self) -> tuple[Callable[[Tensor], Tensor], Energy]:
        return self.decode, self.energy

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels ``(N, 3, ...)`` of latents ``(N, C, ...)``, float32."""
        parts = latents.split(self.at_once or len(latents))
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self._part(part) for part in parts])

    def _part(self, latents: Tensor) -> Tensor:
        if self.frames is None:
            return self.decoder.pixels(latents, self.checkpointed)
        chosen = torch.tensor(self.frames).expand(len(latents), -1)
        pictures = self.decoder.decode_frames(latents, chosen, self.checkpointed)
        return pictures.transpose(1, 2)

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        return self.energy(self.decode(x0), target)
