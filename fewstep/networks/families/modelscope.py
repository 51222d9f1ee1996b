"""ModelScope's text-to-video model: a Stable Diffusion U-Net with layers over time.

Samples are latents ``(B, 4, F, H / 8, W / 8)``; an image VAE encodes frame by frame. Text is
``encoder_hidden_states (B, 77, 1024)``, one for the whole clip. Inside, frames are folded into the
batch, so the blocks' outputs are maps of single frames ``(B * F, C, h, w)``.
"""

from __future__ import annotations

from diffusers import UNet3DConditionModel

from fewstep.networks.families.family import Family, encode_plain
from fewstep.networks.families.unets import TextUNet


class ModelScope(TextUNet):
    """``diffusers.UNet3DConditionModel``."""

    network_class = UNet3DConditionModel


FAMILY = Family("TextToVideoSDPipeline", ModelScope, part="unet", encode=encode_plain)
