"""Latte: a diffusion transformer for videos whose blocks look across space and time in turn."""

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
from torch.nn.functional import silu

from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.errors import FewstepError
from fewstep.networks.classes import check_labels
from fewstep.networks.first_weights import start_as_dit, start_at_zero
from fewstep.networks.patches import from_patches, patch_grid, to_patches

TIME_CHANNELS = 256


class Latte(Backbone):
    """Latte (Ma et al. 2024, arXiv 2401.03048), variant 1, for clips ``(B, C, F, H, W)``.

    Even blocks let the patches of a frame attend to each other, odd ones the frames of a place.
    Time and class modulate each block by a projection of its own (adaLN-Zero, as in DiT). Its
    first weights are drawn as DiT's, blocks and output being zero. (diffusers'
    LatteTransformer3DModel is the later network for text, which knows no classes and shares one
    projection.)

    Args:
        sample_size: height and width of a frame.
        num_frames: frames of a clip.
        channels: channels of a frame.
        patch_size: side of a patch.
        num_layers: blocks, of space and time together.
        num_heads: attention heads a block.
        head_dim: channels a head.
        num_classes: class labels run from 0; the label ``num_classes`` means "no class". Null is a
            network without classes.
        learned_variance: whether it tells the variances of the reverse process too, as Latte does.

    Raises:
        FewstepError: if frames do not divide into patches, or the width into sines and cosines of
            two axes.
    """

    def __init__(
        self,
        sample_size: int,
        num_frames: int,
        channels: int,
        patch_size: int = 2,
        num_layers: int = 6,
        num_heads: int = 4,
        head_dim: int = 24,
        num_classes: int | None = None,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        if width % 4:
            raise FewstepError(
                f"num_heads * head_dim must be a multiple of 4, for positions on two axes, not "
                f"{width}."
            )
        self.config = {
            "sample_size": sample_size,
            "num_frames": num_frames,
            "channels": channels,
            "patch_size": patch_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_classes": num_classes,
            "learned_variance": learned_variance,
        }
        self.sample_shape = (channels, num_frames, sample_size, sample_size)
        self.num_classes = num_classes
        self.learned_variance = learned_variance
        self.patch = (1, patch_size, patch_size)
        self.grid = patch_grid((num_frames, sample_size, sample_size), self.patch)
        values = channels * patch_size**2
        self.embed = nn.Linear(values, width)
        self.register_buffer("places", _places(self.grid[1:], width), persistent=False)
        times = get_1d_sincos_pos_embed_from_grid(width, torch.arange(num_frames), output_type="pt")
        self.register_buffer("moments", times.float()[:, None], persistent=False)
        self.time_features = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, width)
        self.class_embed = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            LatteBlock(width, num_heads, head_dim, across_time=bool(i % 2))
            for i in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 2 * values if learned_variance else values)
        embeddings = [self.time_embed, *([] if self.class_embed is None else [self.class_embed])]
        modulations = [cast(LatteBlock, block).modulation for block in self.blocks]
        start_as_dit(self, embeddings)
        start_at_zero(*modulations, self.out_modulation, self.out)

    @property
    def feature_blocks(self) -> dict[str, int]:
        width = self.config["num_heads"] * self.config["head_dim"]
        return {f"blocks.{i}": width for i in range(len(self.blocks))}

    def feature(self, output: Tensor) -> Tensor:
        """A block's tokens as a map ``(B, C, F, H / patch, W / patch)``."""
        return output.permute(0, 3, 1, 2).unflatten(3, self.grid[1:])

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        if self.num_classes is None:
            return super().null_cond(cond)
        return {"class_labels": torch.full_like(cond["class_labels"], self.num_classes)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Args: ``x_t (B, C, F, H, W)``, ``t (B,)``, ``class_labels (B,)`` integers.

        Raises:
            FewstepError: if there are labels and no classes, or the other way round.
        """
        check_labels(self, class_labels, self.class_embed is not None)
        dtype = self.embed.weight.dtype
        about = self.time_embed(self.time_features(t).to(dtype))
        if self.class_embed is not None:
            about = about + self.class_embed(class_labels)
        patches = self.embed(to_patches(x_t, self.grid, self.patch))
        tokens = patches.unflatten(1, (self.grid[0], -1)) + self.places.to(dtype)
        for number, block in enumerate(self.blocks):
            if number == 1:  # where time is first looked across
                tokens = tokens + self.moments.to(dtype)
            tokens = block(tokens, about)
        shift, scale = self.out_modulation(silu(about))[:, None, None].chunk(2, dim=-1)
        patches = self.out(self.out_norm(tokens) * (1 + scale) + shift)
        return from_patches(patches.flatten(1, 2), self.grid, self.patch)


class LatteBlock(BasicTransformerBlock):
    """A block across space or time; its modulation starts at zero, and with it its branches.

    Args:
        width: channels of a token.
        num_heads: attention heads.
        head_dim: channels a head.
        across_time: whether frames of a place attend to each other, and not places of a frame.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, across_time: bool) -> None:
        super().__init__(
            width,
            num_heads,
            head_dim,
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
        self.across_time = across_time
        # diffusers' table is this layer's bias.
        self.modulation = nn.Linear(width, 6 * width, bias=False)
        nn.init.zeros_(cast(Tensor, self.scale_shift_table))

    def forward(self, hidden_states: Tensor, about: Tensor) -> Tensor:
        """Args: ``hidden_states (B, F, N, width)``, ``about (B, width)`` of time and class."""
        tokens = hidden_states.transpose(1, 2) if self.across_time else hidden_states
        modulation = self.modulation(silu(about)).repeat_interleave(tokens.shape[1], dim=0)
        rows: Tensor = super().forward(tokens.flatten(0, 1), timestep=modulation)
        found = rows.unflatten(0, tokens.shape[:2])
        return found.transpose(1, 2) if self.across_time else found


def _places(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, half of the channels each."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    parts = [
        get_1d_sincos_pos_embed_from_grid(width // 2, axis.flatten(), output_type="pt")
        for axis in axes
    ]
    return torch.cat(parts, dim=1).float()
