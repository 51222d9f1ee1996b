"""Stable Diffusion XL.

Samples are latents ``(B, 4, H / 8, W / 8)``. Text is ``encoder_hidden_states (B, 77, 2048)`` of two
CLIPs side by side and ``text_embeds (B, 1280)``, the second one's pooled embedding. ``time_ids
(B, 6)`` says what the image is cut from: original height and width, top and left of the crop,
target height and width, all in pixels; integers, which half precision cannot round. Data with
random crops give them by sample (``time_ids: true`` of datamodules.fields.Images). Left out, it
stands for a whole image of the network's own size. Released pipelines give their unconditional
branch zeros in place of text, and the same ``time_ids``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion.tables import Table
from fewstep.networks.families.base import NullShapes
from fewstep.networks.families.family import Branches, Configs, Family
from fewstep.networks.families.unets import UNetBackbone

CLIP_TOKENS = 77


class SDXL(UNetBackbone):
    """``diffusers.UNet2DConditionModel`` with pooled text and the image's sizes.

    Args:
        network, sample_shape, null, guidance_embedding_dim: see :class:`UNetBackbone`.
        pixel_size: height and width that a ``time_ids`` left out stands for.
    """

    network_class = UNet2DConditionModel

    def __init__(
        self,
        network: Mapping[str, Any] | nn.Module,
        sample_shape: Sequence[int],
        null: NullShapes | None = None,
        guidance_embedding_dim: int | None = None,
        pixel_size: Sequence[int] = (1024, 1024),
    ) -> None:
        super().__init__(network, sample_shape, null, guidance_embedding_dim)
        self.config["pixel_size"] = list(pixel_size)
        self._own_size = Table(list(time_ids(pixel_size)))

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """As the network's own sizes say, whose null condition may be zeros of any."""
        config = self.network.config
        numbers = 6 * config["addition_time_embed_dim"]
        return {
            "encoder_hidden_states": (CLIP_TOKENS, config["cross_attention_dim"]),
            "text_embeds": (config["projection_class_embeddings_input_dim"] - numbers,),
        }

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Args: as the module says, and the guidance embedding ``(B, dim)``."""
        if time_ids is None:
            time_ids = self._own_size.on(x_t.device).expand(len(x_t), -1)
        output: Tensor = self.network(
            x_t,
            t,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return output


def time_ids(size: Sequence[int]) -> tuple[int, ...]:
    """The six numbers for a whole image of a height and width in pixels."""
    height, width = size
    return (height, width, 0, 0, height, width)


def _encode(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(
        prompts, device=pipeline.text_encoder_2.device, do_classifier_free_guidance=guided
    )
    return (
        {"encoder_hidden_states": text, "text_embeds": pooled},
        {"encoder_hidden_states": empty, "text_embeds": empty_pooled},
    )


def _options(configs: Configs) -> dict[str, Any]:
    return {"pixel_size": configs.size}


def _zeros(index: Mapping[str, Any]) -> tuple[str, ...]:
    # True is diffusers' own default where the folder does not say.
    zeros = index.get("force_zeros_for_empty_prompt", True)
    return ("encoder_hidden_states", "text_embeds") if zeros else ()


FAMILY = Family(
    "StableDiffusionXLPipeline",
    SDXL,
    part="unet",
    encode=_encode,
    options=_options,
    sized=lambda size: {"time_ids": torch.tensor([time_ids(size)])},
    zero_null=_zeros,
)
