"""Plain stacks of diffusers' transformer blocks, as they are before any training."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

Kind = Literal["pre-LN", "no-norm", "adaLN-Zero"]
HEAD_DIM = 16


class BlockStack(nn.Module):
    """Blocks of attention and an MLP, one behind the other, with Xavier's initial weights.

    Args:
        kind: ``pre-LN`` normalises what each branch is given, ``no-norm`` nothing; ``adaLN-Zero``
            also multiplies what each branch gives with a factor that starts at zero, so that every
            block is the identity.
        depth: number of blocks, each of two branches.
        width: channels, a multiple of 16.
        seed: of the weights.
    """

    def __init__(self, kind: Kind, depth: int, width: int, seed: int) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(_block(kind, width) for _ in range(depth))
        self.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        """``z_0 (B, N, C)`` to ``z_L``."""
        given = {}
        if self.kind == "adaLN-Zero":
            zeros = torch.zeros(len(z), dtype=torch.long, device=z.device)
            given = {"timestep": zeros, "class_labels": zeros}
        for block in self.blocks:
            z = block(z, **given)
        return z


def _block(kind: Kind, width: int) -> nn.Module:
    modulated = kind == "adaLN-Zero"
    block = BasicTransformerBlock(
        width,
        width // HEAD_DIM,
        HEAD_DIM,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero" if modulated else "layer_norm",
        num_embeds_ada_norm=1 if modulated else None,
        norm_elementwise_affine=not modulated,
        attention_bias=True,
    )
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if kind == "no-norm":
        block.norm1, block.norm3 = nn.Identity(), nn.Identity()
    if modulated:
        nn.init.zeros_(block.norm1.linear.weight)
    return block
