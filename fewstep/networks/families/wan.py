"""Wan 2.1 text-to-video: rectified flow.

Samples are latents ``(B, 16, (F + 3) / 4, H / 8, W / 8)`` of a causal video VAE, normalised by
channel. Text is ``encoder_hidden_states (B, 512, 4096)`` of a UMT5, zero behind its last token.
Times are ``1000 sigma``.
"""

from __future__ import annotations

import math
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.families.family import Branches, Configs, Family, text_length
from fewstep.networks.families.transformers import TransformerBackbone


class Wan(TransformerBackbone):
    """``diffusers.WanTransformer3DModel``."""

    network_class = WanTransformer3DModel
    stacks = ("blocks",)

    @property
    def num_tokens(self) -> int:
        patches = zip(self.sample_shape[1:], self.network.config["patch_size"], strict=True)
        return math.prod(size // patch for size, patch in patches)

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Args: ``x_t (B, C, F, H, W)``, ``t (B,)``, text ``(B, L, D)``."""
        output: Tensor = self.network(
            x_t, timestep=t, encoder_hidden_states=encoder_hidden_states, return_dict=False
        )[0]
        return output


def _encode(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    text, empty = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=guided,
        max_sequence_length=text_length(pipeline),
        device=pipeline.text_encoder.device,
    )
    return {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}


def _options(configs: Configs) -> dict[str, Any]:
    index = configs.index
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise FewstepError(
            "This is a Wan 2.2 pipeline with two networks or a time for each token; of Wan, "
            "text-to-video pipelines with one network and one time are supported (2.1)."
        )
    return {}


FAMILY = Family("WanPipeline", Wan, encode=_encode, options=_options)
