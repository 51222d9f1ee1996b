"""Plain pre-LN transformer with or without long skips, for images and videos (U-ViT)."""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.networks.classes import check_labels
from fewstep.networks.gates.precision import StreamLinear
from fewstep.networks.patches import from_patches, patch_grid, to_patches


class UViT(Backbone):
    """U-ViT (Bao et al. 2023, arXiv 2209.12152): time, class and patches all are tokens.

    Its blocks are plain, ``z + attention(norm(z))`` and then ``z + mlp(norm(z))``: no modulation
    scales their branches, and none starts at zero. With ``long_skips`` the output of each block of
    the first half is fused, ``W [z, skip] + b``, into the stream before its mirror image in the
    second; without, the network is a plain chain. Samples are images ``(B, C, H, W)`` or, with
    ``num_frames``, clips ``(B, C, F, H, W)``, whose patches attend to each other across space and
    time at once.

    Args:
        sample_size: height and width of a sample.
        channels: channels of a sample.
        num_frames: frames of a clip; null for images.
        patch_size: side of a patch.
        patch_frames: frames of a patch.
        num_layers: number of blocks; the paper's depth of 28 are 14, one in the middle and 14.
        num_heads: attention heads a block.
        head_dim: channels a head.
        num_classes: class labels run from 0; the label ``num_classes`` means "no class". Null is a
            network without classes.
        long_skips: whether blocks of the second half see those of the first.
        time_mlp: whether the time's sines and cosines go through two layers before they are a
            token.
        final_conv: whether a convolution over 3 pixels (and frames) ends the network.
        init_std: standard deviation of the linear layers' first weights. The paper's 0.02 is for
            widths of about 1000; what a layer gives grows with the root of its width.
        scaled_start: start the last layer of each branch, 2 a block, at ``1 / sqrt(2 num_layers)``
            of that (as GPT-2 does), which ``gates.init: depth`` does by gates.

    Raises:
        FewstepError: if samples do not divide into patches.
    """

    def __init__(
        self,
        sample_size: int,
        channels: int,
        num_frames: int | None = None,
        patch_size: int = 2,
        patch_frames: int = 1,
        num_layers: int = 13,
        num_heads: int = 4,
        head_dim: int = 24,
        num_classes: int | None = 10,
        long_skips: bool = True,
        time_mlp: bool = False,
        final_conv: bool = False,
        init_std: float = 0.02,
        scaled_start: bool = False,
    ) -> None:
        super().__init__()
        self.config = {
            "sample_size": sample_size,
            "channels": channels,
            "num_frames": num_frames,
            "patch_size": patch_size,
            "patch_frames": patch_frames,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_classes": num_classes,
            "long_skips": long_skips,
            "time_mlp": time_mlp,
            "final_conv": final_conv,
            "init_std": init_std,
            "scaled_start": scaled_start,
        }
        frames = () if num_frames is None else (num_frames,)
        self.sample_shape = (channels, *frames, sample_size, sample_size)
        self.num_classes = num_classes
        self.patch = (patch_frames, patch_size, patch_size)
        self.grid = patch_grid((num_frames or 1, sample_size, sample_size), self.patch)
        self.extras = 1 if num_classes is None else 2
        width = self.width = num_heads * head_dim
        values = channels * patch_frames * patch_size**2
        tokens = self.extras + self.grid[0] * self.grid[1] * self.grid[2]
        self.embed = nn.Linear(values, width)
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.time_features = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(width, 4 * width, out_dim=width) if time_mlp else None
        self.class_embed = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(_block(width, num_heads, head_dim) for _ in range(num_layers))
        self.fuses = nn.ModuleList(Fuse(width) for _ in range(num_layers // 2 * long_skips))
        self.out_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, values)
        self.final_conv = _conv(channels, num_frames is not None) if final_conv else None
        self._start(init_std, scaled_start)

    def _start(self, std: float, scaled: bool) -> None:
        """The paper's start; patches and classes keep torch's own."""
        nn.init.trunc_normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name != "embed":
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        ends = [b.get_submodule(end) for b in self.blocks for end in ("attn1.to_out.0", "ff.net.2")]
        with torch.no_grad():
            for end in ends if scaled else ():
                cast(nn.Linear, end).weight.mul_(len(ends) ** -0.5)

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {f"blocks.{i}": self.width for i in range(len(self.blocks))}

    @property
    def shard_units(self) -> list[str]:
        return [*self.feature_blocks, *(f"fuses.{i}" for i in range(len(self.fuses)))]

    def feature(self, output: Tensor) -> Tensor:
        """A block's patches as a map ``(B, C, H / patch, W / patch)``, of clips with frames."""
        grid = self.grid if self.config["num_frames"] is not None else self.grid[1:]
        return output[:, self.extras :].transpose(1, 2).unflatten(2, grid)

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        if self.num_classes is None:
            return super().null_cond(cond)
        return {"class_labels": torch.full_like(cond["class_labels"], self.num_classes)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Args: ``x_t (B, C, [F,] H, W)``, ``t (B,)``, ``class_labels (B,)`` integers.

        Raises:
            FewstepError: if there are labels and no classes, or the other way round.
        """
        clip = x_t if self.config["num_frames"] is not None else x_t.unsqueeze(2)
        patches = self.embed(to_patches(clip, self.grid, self.patch))
        tokens = torch.cat([*self._about(t, class_labels), patches], dim=1) + self.positions
        skips: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            late = number - (len(self.blocks) - len(self.fuses))
            if late >= 0:
                tokens = self.fuses[late](tokens, skips.pop())
            tokens = block(tokens)
            if number < len(self.fuses):
                skips.append(tokens)
        patches = self.out(self.out_norm(tokens[:, self.extras :]))
        sample = from_patches(patches, self.grid, self.patch).reshape(x_t.shape)
        return sample if self.final_conv is None else cast(Tensor, self.final_conv(sample))

    def _about(self, t: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """The class's token and the time's, ``(B, 1, width)`` each."""
        check_labels(self, class_labels, self.class_embed is not None)
        time = self.time_features(t).to(self.embed.weight.dtype)
        if self.time_embed is not None:
            time = self.time_embed(time)
        tokens = [time] if self.class_embed is None else [self.class_embed(class_labels), time]
        return [token.unsqueeze(1) for token in tokens]


class Fuse(nn.Module):
    """A long skip's way into the stream: ``W [z, skip] + b``.

    Args:
        width: channels of both.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.skip_linear = StreamLinear(2 * width, width)

    def forward(self, tokens: Tensor, skip: Tensor) -> Tensor:
        """Args: both ``(B, N, width)``."""
        fused: Tensor = self.skip_linear(torch.cat([tokens, skip], dim=-1))
        return fused


def _block(width: int, num_heads: int, head_dim: int) -> BasicTransformerBlock:
    return BasicTransformerBlock(
        width, num_heads, head_dim, activation_fn="gelu", norm_type="layer_norm"
    )


def _conv(channels: int, video: bool) -> nn.Module:
    kind = nn.Conv3d if video else nn.Conv2d
    return kind(channels, channels, 3, padding=1)
