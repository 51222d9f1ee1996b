"""Stable Diffusion 1.x and 2.x.

Samples are latents ``(B, 4, H / 8, W / 8)``; text is ``encoder_hidden_states (B, 77, D)`` of one
CLIP (``D`` 768 in 1.x, 1024 in 2.x). The two differ in nothing else the network shows: that 2.x at
768 pixels predicts ``v`` is in its scheduler's configuration, and from there in the Denoiser.
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from fewstep.networks.families.family import Family, encode_plain
from fewstep.networks.families.unets import TextUNet


class StableDiffusion(TextUNet):
    """``diffusers.UNet2DConditionModel`` with one text encoder."""

    network_class = UNet2DConditionModel


FAMILY = Family("StableDiffusionPipeline", StableDiffusion, part="unet", encode=encode_plain)
