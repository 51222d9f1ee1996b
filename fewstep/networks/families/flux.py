"""FLUX.1 dev and schnell: rectified flow on packed latents.

Samples are latents ``(B, 16, H / 8, W / 8)``; the network sees tokens of 2 x 2 latents, packed and
unpacked here. Text is ``encoder_hidden_states (B, 512, 4096)`` of a T5 and ``pooled_projections
(B, 768)`` of a CLIP. The network takes ``sigma = t / 1000``. dev is guidance-distilled: it takes
the scale itself as ``guidance (B,)``, 3.5 where it is left out as in the pipeline. That is a number
and no embedding of one, so it is not the ``guidance_input`` of consistency distillation. The
pipeline has no unconditional branch unless it is given a negative prompt; the null condition here
is the empty prompt's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from fewstep.networks.families.family import Branches, Family, text_length
from fewstep.networks.families.transformers import JointTransformerBackbone

PIPELINE_GUIDANCE = 3.5


class Flux(JointTransformerBackbone):
    """``diffusers.FluxTransformer2DModel`` on unpacked latents."""

    network_class = FluxTransformer2DModel
    stacks = ("transformer_blocks", "single_transformer_blocks")

    @property
    def num_tokens(self) -> int:
        height, width = self.sample_shape[-2:]
        return (height // 2) * (width // 2)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Args: ``x_t (B, C, H, W)``, ``t (B,)``, text ``(B, L, D)`` and ``(B, P)``."""
        height, width = x_t.shape[-2:]
        if not self.network.config["guidance_embeds"]:
            guidance = None
        elif guidance is None:
            guidance = t.new_full((len(x_t),), PIPELINE_GUIDANCE)
        tokens: Tensor = self.network(
            hidden_states=packed(x_t),
            timestep=t / 1000,
            guidance=guidance,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            img_ids=token_positions(height // 2, width // 2, x_t.device),
            txt_ids=t.new_zeros(encoder_hidden_states.shape[1], 3, dtype=torch.float32),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)


def packed(latents: Tensor) -> Tensor:
    """Latents ``(B, C, H, W)`` as tokens ``(B, H / 2 * W / 2, 4 C)`` of 2 x 2 latents."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`packed`."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return torch.nn.functional.pixel_shuffle(grid, 2)


def token_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions ``(rows * columns, 3)`` of image tokens: nothing, row, column."""
    grid = torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    )
    return torch.nn.functional.pad(grid, (1, 0)).float()  # bfloat16 would round beyond 256


def _encode(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    def embedded(texts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = pipeline.encode_prompt(
            texts,
            None,
            device=pipeline.text_encoder.device,
            max_sequence_length=text_length(pipeline),
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    return embedded(prompts), embedded([""] * len(prompts)) if guided else {}


FAMILY = Family(
    "FluxPipeline",
    Flux,
    encode=_encode,
    latent_channels=lambda config: int(config["in_channels"]) // 4,
    latent_size=128,
    patch=2,
    pipeline_latents=packed,
)
