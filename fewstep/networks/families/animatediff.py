"""AnimateDiff: Stable Diffusion with a motion adapter.

Samples are latents ``(B, 4, F, H / 8, W / 8)``; an image VAE encodes frame by frame. Text is
``encoder_hidden_states (B, 77, 768)``, one for the clip outside; the network wants it once a frame.
Adapters were trained with linear betas, not those of the image model, whose scheduler a pipeline
made of both keeps unless it is given another: loading such a folder warns. The adapter's positional
encodings bound the number of frames (``motion_max_seq_length``, 32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn

from fewstep.networks.families.family import Family, encode_plain
from fewstep.networks.families.unets import TextUNet


class AnimateDiff(TextUNet):
    """``diffusers.UNetMotionModel``: the image model's weights and the adapter's."""

    network_class = UNetMotionModel

    def __init__(self, network: Mapping[str, Any] | nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(network, *args, **kwargs)
        for module in self.network.modules():
            if isinstance(module, SinusoidalPositionalEmbedding):
                module.register_forward_hook(_as_its_input)

    def text_inside(self, text: Tensor, x_t: Tensor) -> Tensor:
        return text.repeat_interleave(x_t.shape[2], dim=0)


def _as_its_input(_module: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor:
    # The table added is a buffer, which mixed precision leaves in float32, and the sum with it.
    return output.to(inputs[0].dtype)


FAMILY = Family(
    "AnimateDiffPipeline", AnimateDiff, part="unet", encode=encode_plain, betas="linear"
)
