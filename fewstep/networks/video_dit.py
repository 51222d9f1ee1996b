"""Class-conditional diffusion transformer for videos, from diffusers' blocks."""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    get_1d_sincos_pos_embed_from_grid,
)
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.errors import FewstepError
from fewstep.networks.patches import from_patches, patch_grid, to_patches

TIME_CHANNELS = 256


class VideoDiT(Backbone):
    """A transformer over all patches of a clip ``(B, C, F, H, W)`` together.

    Patches attend to each other across space and time at once, as in CogVideoX and Wan; time and
    class modulate all blocks by one shared projection and a table a block (adaLN-single, PixArt,
    Chen et al. 2023). Blocks and output start at zero, so the untrained network gives zero.

    Args:
        sample_size: height and width of a frame.
        num_frames: frames of a clip.
        channels: channels of a frame.
        patch_size: side of a patch.
        patch_frames: frames of a patch.
        num_layers: number of transformer blocks.
        num_heads: attention heads a block.
        head_dim: channels a head.
        num_classes: class labels run from 0; the label ``num_classes`` means "no class".

    Raises:
        FewstepError: if frames do not divide into patches, or the width into sines and cosines of
            three axes.
    """

    def __init__(
        self,
        sample_size: int,
        num_frames: int,
        channels: int,
        patch_size: int = 2,
        patch_frames: int = 1,
        num_layers: int = 6,
        num_heads: int = 4,
        head_dim: int = 24,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        if width % 6:
            raise FewstepError(
                f"num_heads * head_dim must be a multiple of 6, for positions on three axes, "
                f"not {width}."
            )
        self.config = {
            "sample_size": sample_size,
            "num_frames": num_frames,
            "channels": channels,
            "patch_size": patch_size,
            "patch_frames": patch_frames,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_classes": num_classes,
        }
        self.sample_shape = (channels, num_frames, sample_size, sample_size)
        self.num_classes = num_classes
        self.patch = (patch_frames, patch_size, patch_size)
        self.grid = patch_grid((num_frames, sample_size, sample_size), self.patch)
        patch_values = channels * patch_frames * patch_size**2
        self.embed = nn.Linear(patch_values, width)
        self.register_buffer("positions", _positions(self.grid, width), persistent=False)
        self.time_features = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                num_heads,
                head_dim,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
            for _ in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.out_table = nn.Parameter(torch.zeros(2, width))
        self.out = nn.Linear(width, patch_values)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for linear in (self.modulation, self.out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for block in self.blocks:
            nn.init.zeros_(cast(Tensor, block.scale_shift_table))

    @property
    def feature_blocks(self) -> dict[str, int]:
        width = self.config["num_heads"] * self.config["head_dim"]
        return {f"blocks.{i}": width for i in range(self.config["num_layers"])}

    def feature(self, output: Tensor) -> Tensor:
        """A block's tokens as a map ``(B, C, F / patch_frames, H / patch, W / patch)``."""
        return output.transpose(1, 2).unflatten(2, self.grid)

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {"class_labels": torch.full_like(cond["class_labels"], self.num_classes)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Args: ``x_t (B, C, F, H, W)``, ``t (B,)``, ``class_labels (B,)`` integers."""
        features = self.time_features(t).to(self.embed.weight.dtype)
        about = self.time_embed(features) + self.class_embed(class_labels)
        modulation = self.modulation(nn.functional.silu(about))
        patches = self.embed(to_patches(x_t, self.grid, self.patch))
        tokens = patches + self.positions.to(patches.dtype)
        for block in self.blocks:
            tokens = block(tokens, timestep=modulation)
        shift, scale = (self.out_table + about[:, None]).unsqueeze(2).unbind(1)
        patches = self.out(self.out_norm(tokens) * (1 + scale) + shift)
        return from_patches(patches, self.grid, self.patch)


def _positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Sines and cosines of each patch's frame, row and column, a third of the channels each."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    parts = [
        get_1d_sincos_pos_embed_from_grid(width // 3, axis.flatten(), output_type="pt")
        for axis in axes
    ]
    return torch.cat(parts, dim=1).float()
