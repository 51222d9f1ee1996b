"""Diffusion in pixels by a U-Net (Ho et al. 2020), as released for CIFAR-10, LSUN and CelebA-HQ.

Samples are pixels ``(B, 3, H, W)`` in [-1, 1]: there is no VAE and no text. A network with classes
takes ``class_labels (B,)``, integers from 0.
"""

from __future__ import annotations

from dataclasses import replace

from diffusers import UNet2DModel
from torch import Tensor

from fewstep.diffusion.denoiser import Cond
from fewstep.errors import FewstepError
from fewstep.networks.classes import check_labels
from fewstep.networks.families.base import DiffusersBackbone
from fewstep.networks.families.family import Family
from fewstep.networks.families.unets import unet_blocks


class PixelUNet(DiffusersBackbone):
    """``diffusers.UNet2DModel``; some tell variances too."""

    network_class = UNet2DModel
    may_tell_variance = True

    @property
    def feature_blocks(self) -> dict[str, int]:
        return unet_blocks(self.network)

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """Nothing, of a network without classes.

        Raises:
            FewstepError: if it has classes: none of them means "no class".
        """
        if self.network.class_embedding is not None:
            raise FewstepError(
                "This U-Net was trained with classes and has none that means 'no class', which "
                "classifier-free guidance needs; sample it with a guidance scale of 1 and, where "
                "it is steered, with unconditional: false."
            )
        return {}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Args: ``x_t (B, 3, H, W)``, ``t (B,)``, ``class_labels (B,)`` integers, or none.

        Raises:
            FewstepError: if it has classes and gets none, or the other way round.
        """
        check_labels(self, class_labels, self.network.class_embedding is not None)
        output: Tensor = self.network(x_t, t, class_labels, return_dict=False)[0]
        return output


FAMILY = Family("DDPMPipeline", PixelUNet, part="unet", latent=False)
WITH_DDIM = replace(FAMILY, pipeline="DDIMPipeline")
