"""What all diffusion transformers of diffusers have in common."""

from __future__ import annotations

from torch import Tensor

from fewstep.networks.families.base import DiffusersBackbone


class TransformerBackbone(DiffusersBackbone):
    """A transformer, whose blocks are its features and its shards.

    Attributes:
        stacks: names of the network's lists of blocks.
    """

    stacks: tuple[str, ...] = ("transformer_blocks",)

    @property
    def feature_blocks(self) -> dict[str, int]:
        config = self.network.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return {
            f"network.{stack}.{i}": width
            for stack in self.stacks
            for i in range(len(getattr(self.network, stack)))
        }


class JointTransformerBackbone(TransformerBackbone):
    """A transformer whose blocks return the text's tokens, then the sample's."""

    def feature(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[1]
