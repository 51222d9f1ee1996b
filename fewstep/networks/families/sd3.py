"""Stable Diffusion 3 and 3.5: rectified flow.

Samples are latents ``(B, 16, H / 8, W / 8)``. Text is ``encoder_hidden_states
(B, 77 + 256, 4096)``, the two CLIPs' padded with zeros and in front of the T5's, and
``pooled_projections (B, 2048)``. Times are ``1000 sigma``. Pipelines without the T5 have zeros in
its place.
"""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep.networks.families.family import (
    Branches,
    Configs,
    Family,
    TextShapes,
    text_length,
)
from fewstep.networks.families.transformers import JointTransformerBackbone

TOKENS = 77 + 256  # of the CLIPs, and of the T5


class SD3(JointTransformerBackbone):
    """``diffusers.SD3Transformer2DModel``."""

    network_class = SD3Transformer2DModel

    def forward(
        self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Args: ``x_t (B, C, H, W)``, ``t (B,)``, text ``(B, L, D)`` and ``(B, P)``."""
        output: Tensor = self.network(
            x_t,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=t,
            return_dict=False,
        )[0]
        return output


def _encode(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=guided,
        max_sequence_length=text_length(pipeline),
    )
    return (
        {"encoder_hidden_states": text, "pooled_projections": pooled},
        {"encoder_hidden_states": empty, "pooled_projections": empty_pooled},
    )


def _text_shapes(configs: Configs) -> TextShapes:
    network = configs.network
    return {
        "encoder_hidden_states": (TOKENS, network["joint_attention_dim"]),
        "pooled_projections": (network["pooled_projection_dim"],),
    }


FAMILY = Family("StableDiffusion3Pipeline", SD3, encode=_encode, text_shapes=_text_shapes)
