"""LTX-Video: rectified flow on a strongly compressed video latent.

Samples are latents ``(B, 128, (F + 7) / 8, H / 32, W / 32)``, normalised by channel; the network
sees one token a latent, in the order of frames, rows, columns. Text is ``encoder_hidden_states
(B, 128, 4096)`` of a T5 with ``encoder_attention_mask (B, 128)``. Positions are in seconds and
pixels, so the network must know the frame rate and the VAE's factors (``rope_scale``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.families.base import NullShapes
from fewstep.networks.families.family import Configs, Family, encode_masked
from fewstep.networks.families.transformers import TransformerBackbone

PIPELINE_FRAME_RATE = 25


class LTX(TransformerBackbone):
    """``diffusers.LTXVideoTransformer3DModel`` on unpacked latents.

    Args:
        network, sample_shape, null: see :class:`DiffusersBackbone`.
        rope_scale: seconds, rows and columns of pixels from one latent to the next.
    """

    network_class = LTXVideoTransformer3DModel

    def __init__(
        self,
        network: Mapping[str, Any] | nn.Module,
        sample_shape: Sequence[int],
        null: NullShapes | None = None,
        rope_scale: Sequence[float] = (8 / PIPELINE_FRAME_RATE, 32, 32),
    ) -> None:
        super().__init__(network, sample_shape, null)
        if (self.network.config["patch_size"], self.network.config["patch_size_t"]) != (1, 1):
            raise FewstepError("LTX networks with patches of more than one latent are unsupported.")
        self.config["rope_scale"] = list(rope_scale)
        self.rope_scale = tuple(rope_scale)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.sample_shape[1:])

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        """Args: ``x_t (B, C, F, H, W)``, ``t (B,)``, text ``(B, L, D)``, its mask ``(B, L)``."""
        frames, height, width = x_t.shape[2:]
        tokens: Tensor = self.network(
            packed(x_t),
            encoder_hidden_states=encoder_hidden_states,
            timestep=t,
            encoder_attention_mask=encoder_attention_mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self.rope_scale,
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


def packed(latents: Tensor) -> Tensor:
    """Latents ``(B, C, F, H, W)`` as tokens ``(B, F * H * W, C)``."""
    return latents.flatten(2).transpose(1, 2)


def _options(configs: Configs) -> dict[str, Any]:
    time, space = configs.factors
    return {"rope_scale": (time / PIPELINE_FRAME_RATE, space, space)}


FAMILY = Family("LTXPipeline", LTX, encode=encode_masked, options=_options, pipeline_latents=packed)
