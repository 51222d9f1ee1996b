"""A whole denoiser turned discriminator: learnt queries read its blocks, one logit a sample.

Adversarial Post-Training (Lin et al. 2025, arXiv 2501.08316), section 3.3 and figure 1. The paper's
figure names the layers of a head; head counts, ratios and initial values are not published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError, nearest
from fewstep.networks.discriminator import tapped

PUBLISHED_DEPTHS = (16, 26, 36)  # of 36 blocks, counted from 1
HEAD_DIM = 64
TOKEN_STD = 0.02


def scaled_depths(num_blocks: int) -> list[int]:
    """The published depths in a network of so many blocks, counted from 1; the last is its end."""
    end = PUBLISHED_DEPTHS[-1]
    depths = {max(1, round(num_blocks * depth / end)) for depth in PUBLISHED_DEPTHS}
    return sorted(depths)


def as_tokens(feature: Tensor, batch_size: int) -> Tensor:
    """A block's output as all tokens of each sample, ``(B, N, C)``.

    Args:
        feature: ``(B, N, C)`` tokens; maps ``(B, C, h, w)`` or ``(B, C, F, h, w)``, or frame by
            frame ``(B * F, C, h, w)``, as video U-Nets have them inside; or ``(B, C)``.
        batch_size: ``B``.
    """
    if feature.ndim == 2:
        return feature[:, None]
    if feature.ndim > 3:
        feature = feature.flatten(2).transpose(1, 2)
    if len(feature) != batch_size:
        feature = feature.unflatten(0, (batch_size, -1)).flatten(1, 2)
    return feature


class _Wide:
    """Mixed into a layer's class: computes in the precision of its weights, whatever autocast says.

    A class, rather than a replaced ``forward``, so that copies of the layer are whole.
    """

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = super().forward(x.to(self.weight.dtype))  # type: ignore[misc]
        return found


def keep_wide_outside_blocks(backbone: Backbone) -> None:
    """Lets the few layers outside of the blocks, the sample's embedding among them, stay float32.

    The stream of tokens through the blocks then is float32 too. In bfloat16, whose numbers around 1
    lie 0.008 apart, a perturbation of 0.01 would be lost among roundings.
    """
    inside = tuple(f"{name}." for name in backbone.feature_blocks)
    for name, module in backbone.named_modules():
        kind = type(module)
        layer = isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
        if layer and not isinstance(module, _Wide) and not f"{name}.".startswith(inside):
            module.__class__ = type(kind.__name__, (_Wide, kind), {})


class QueryHead(nn.Module):
    """One learnt token attends to all tokens of a sample: a transformer block without itself.

    Keys and values are normalised tokens; queries and keys are normalised again, head by head. Then
    an MLP; both are residual.

    Args:
        width: channels of the tokens, and of what it gives.
        expansion: of the MLP.
    """

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.num_heads = width // math.gcd(width, HEAD_DIM)
        head_dim = width // self.num_heads
        self.token = nn.Parameter(torch.randn(1, 1, width) * TOKEN_STD)
        self.norm = nn.RMSNorm(width)
        self.to_query, self.to_key, self.to_value, self.to_out = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.query_norm, self.key_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, expansion * width),
            nn.GELU(),
            nn.Linear(expansion * width, width),
        )

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(B, N, C)``, of which ``valid (B, N)`` are the sample's own, to ``(B, C)``."""
        given = self.norm(tokens)
        query = self.query_norm(self._heads(self.to_query(self.token)))
        key, value = self.key_norm(self._heads(self.to_key(given))), self.to_value(given)
        mask = None if valid is None else valid[:, None, None]
        read = F.scaled_dot_product_attention(
            query.expand(len(tokens), -1, -1, -1), key, self._heads(value), attn_mask=mask
        )
        token = self.token + self.to_out(read.transpose(1, 2).flatten(2))
        found: Tensor = token + self.mlp(token)
        return found[:, 0]

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class QueryDiscriminator(nn.Module):
    """A denoiser's network, trained whole, with heads that read some of its blocks.

    The network sees a clean sample where it used to see a noisy one, its usual conditions, and a
    time that says nothing of the sample. What the heads read is joined into one logit.

    Args:
        backbone: the network with the diffusion model's weights; it is taken over, not copied.
        blocks: names of the blocks to read; the published depths scaled to the network by default.
        wide: see :func:`keep_wide_outside_blocks`.

    Raises:
        FewstepError: for a block that it does not have, or a network without named blocks.
    """

    def __init__(
        self, backbone: Backbone, blocks: Sequence[str] | None = None, wide: bool = True
    ) -> None:
        super().__init__()
        available = backbone.feature_blocks
        names = list(available)
        if not names:
            raise FewstepError(
                f"{type(backbone).__name__} names no feature blocks that a discriminator could "
                "read; give the backbone a `feature_blocks`."
            )
        self.blocks = list(blocks or (names[depth - 1] for depth in scaled_depths(len(names))))
        unknown = next((name for name in self.blocks if name not in available), None)
        if unknown is not None:
            raise FewstepError(
                f"discriminator_blocks: the network has no block '{unknown}'."
                f"{nearest(unknown, names)} It has {', '.join(names)}."
            )
        self.backbone = backbone
        if wide:
            keep_wide_outside_blocks(backbone)
        for module in backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # which would enter the difference of clean and perturbed logits
        widths = [available[name] for name in self.blocks]
        self.heads = nn.ModuleList(QueryHead(width) for width in widths)
        self.norm = nn.LayerNorm(sum(widths))
        self.logit = nn.Linear(sum(widths), 1)

    @property
    def shard_units(self) -> list[str]:
        """Names of its heads, which FSDP2 gathers one at a time as it does the network's blocks."""
        return [f"heads.{number}" for number in range(len(self.heads))]

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Logits ``(B,)`` of samples ``x (B, ...)`` under conditions, told times ``t (B,)``."""
        given = dict(cond or {})
        with tapped(self.backbone, self.blocks) as taken:
            output = self.backbone(x, t.to(work_dtype(x)), **given)
        valid = self.backbone.token_mask(x, given)
        features = [as_tokens(taken[name], len(x)) for name in self.blocks]
        # The network's own output is not read. Times zero, it still leads gradient, which is zero,
        # to the layers behind the last block: none is unused, on any rank, and FSDP2 gathers what
        # is outside of blocks again for the backward pass.
        unread = 0 * output.flatten(1).mean(1)
        return self.score(features, valid) + unread.to(self.logit.weight.dtype)

    def score(self, features: Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
        """Logits ``(B,)`` of tokens ``(B, N, C)``, in the heads' own precision."""
        dtype = self.logit.weight.dtype
        with torch.autocast(features[0].device.type, enabled=False):
            read = [
                head(feature.to(dtype), valid)
                for head, feature in zip(self.heads, features, strict=True)
            ]
            logits: Tensor = self.logit(self.norm(torch.cat(read, dim=1)))
        return logits[:, 0]
