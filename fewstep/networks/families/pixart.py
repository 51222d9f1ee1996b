"""PixArt-Sigma: a DiT with cross-attention to a T5.

Samples are latents ``(B, 4, H / 8, W / 8)``. Text is ``encoder_hidden_states (B, 300, 4096)`` with
``encoder_attention_mask (B, 300)``. The network also tells variances, which deterministic samplers
do not use. Its networks are told nothing of sizes.
"""

from __future__ import annotations

from diffusers import PixArtTransformer2DModel
from torch import Tensor

from fewstep.networks.families.family import Family, encode_masked
from fewstep.networks.families.transformers import TransformerBackbone


class PixArtSigma(TransformerBackbone):
    """``diffusers.PixArtTransformer2DModel``."""

    network_class = PixArtTransformer2DModel
    may_tell_variance = True

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        """Args: ``x_t (B, C, H, W)``, ``t (B,)``, text ``(B, L, D)``, its mask ``(B, L)``."""
        output: Tensor = self.network(
            x_t,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output


FAMILY = Family("PixArtSigmaPipeline", PixArtSigma, encode=encode_masked)
