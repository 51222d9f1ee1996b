"""Class-conditional diffusion transformer: diffusers' own DiT behind the Backbone face."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.networks.first_weights import start_as_dit, start_at_zero


class DiT(Backbone):
    """``diffusers.DiTTransformer2DModel`` for class-conditional images ``(B, C, H, W)``.

    Modulation and output start at zero (Peebles & Xie 2023); ``init_std`` says how all else does.
    There are more weights than in DiT: diffusers embeds time and class anew in every block, DiT
    once, so an XL/2 for ImageNet has 750 million and not 675. diffusers' label embedding drops
    labels at random in train mode, in each block on its own; that is switched off here, and class
    dropout is the training step's business.

    Args:
        sample_size: height and width of a sample.
        channels: channels of a sample.
        patch_size: side of a patch; a sample becomes ``(sample_size / patch_size)^2`` tokens.
        num_layers: number of transformer blocks.
        num_heads: attention heads a block.
        head_dim: channels a head.
        num_classes: class labels run from 0; the label ``num_classes`` means "no class".
        init_std: standard deviation of the first embeddings of time and class, all other layers
            being drawn as in DiT's code too. Its 0.02 is for widths of about 1000: what embeddings
            do grows with the width. Null leaves them as diffusers and torch draw them.
        learned_variance: whether it tells the variances of the reverse process too, as DiT does.
    """

    def __init__(
        self,
        sample_size: int,
        channels: int,
        patch_size: int = 2,
        num_layers: int = 4,
        num_heads: int = 4,
        head_dim: int = 24,
        num_classes: int = 10,
        init_std: float | None = None,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        self.config = {  # not how it was first drawn
            "sample_size": sample_size,
            "channels": channels,
            "patch_size": patch_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_classes": num_classes,
            "learned_variance": learned_variance,
        }
        self.sample_shape = (channels, sample_size, sample_size)
        self.learned_variance = learned_variance
        self.num_classes = num_classes
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            in_channels=channels,
            out_channels=2 * channels if learned_variance else channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_classes,
        )
        norms = [block.norm1 for block in self.transformer.transformer_blocks]
        for norm in norms:
            norm.emb.class_embedder.dropout_prob = 0.0
        if init_std is not None:
            start_as_dit(self, [norm.emb for norm in norms], init_std)
        last = (self.transformer.proj_out_1, self.transformer.proj_out_2)
        start_at_zero(*(norm.linear for norm in norms), *last)

    @property
    def feature_blocks(self) -> dict[str, int]:
        width = self.config["num_heads"] * self.config["head_dim"]
        return {
            f"transformer.transformer_blocks.{i}": width for i in range(self.config["num_layers"])
        }

    @property
    def shard_units(self) -> list[str]:
        # diffusers' DiT asks its first block for the embedding that its last layer needs, so that
        # block's parameters must be there outside of its own forward pass.
        return list(self.feature_blocks)[1:]

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {"class_labels": torch.full_like(cond["class_labels"], self.num_classes)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Args: ``x_t (B, C, H, W)``, ``t (B,)``, ``class_labels (B,)`` integers."""
        output: Tensor = self.transformer(
            x_t, timestep=t, class_labels=class_labels, return_dict=False
        )[0]
        return output
