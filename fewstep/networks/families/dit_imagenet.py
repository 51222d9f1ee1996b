"""DiT on ImageNet (Peebles & Xie 2023), as released.

Samples are latents ``(B, 4, H / 8, W / 8)``, conditioned by ``class_labels (B,)``, integers from 0.
The label after the last class means "no class". The network also tells the variances of its
reverse process (:mod:`fewstep.diffusion.ancestral`). In train mode diffusers drops labels at
random, in each block on its own; that is switched off, and class dropout is the training step's
business. (:class:`fewstep.networks.dit.DiT` is the same network made from scratch.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Cond
from fewstep.networks.families.base import NullShapes
from fewstep.networks.families.family import Family
from fewstep.networks.families.transformers import TransformerBackbone


class DiTImageNet(TransformerBackbone):
    """``diffusers.DiTTransformer2DModel`` as it is in a pipeline's folder."""

    network_class = DiTTransformer2DModel
    may_tell_variance = True

    def __init__(
        self,
        network: Mapping[str, Any] | nn.Module,
        sample_shape: Sequence[int],
        null: NullShapes | None = None,
    ) -> None:
        super().__init__(network, sample_shape, null)
        self.num_classes: int = self.network.config["num_embeds_ada_norm"]
        for block in self.network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def shard_units(self) -> list[str]:
        # The last layer asks the first block for its embedding, outside of its forward pass.
        return list(self.feature_blocks)[1:]

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.num_classes)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Args: ``x_t (B, C, H, W)``, ``t (B,)``, ``class_labels (B,)`` integers."""
        output: Tensor = self.network(
            x_t, timestep=t, class_labels=class_labels, return_dict=False
        )[0]
        return output


FAMILY = Family("DiTPipeline", DiTImageNet)
