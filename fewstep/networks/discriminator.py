"""Discriminators over the features of a frozen denoiser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from fewstep.diffusion.denoiser import Backbone, Cond, Denoiser
from fewstep.errors import FewstepError, nearest


@contextmanager
def tapped(backbone: Backbone, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the named sub-modules during the enclosed forward passes.

    Hooks instead of a copy of the backbone's forward: nothing to keep in step with its library.
    """
    taken: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            taken[name] = backbone.feature(output)

        return hook

    handles = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def as_map(feature: Tensor, sample: Tensor) -> Tensor:
    """Brings a block's output to ``(B, C, h, w)``; video frames fold into the batch.

    Args:
        feature: ``(B, N, C)`` tokens, ``(B, C, h, w)``, ``(B, C, F, h, w)`` or ``(B, C)``.
        sample: the network's input, whose aspect ratio says how ``N`` tokens form a map. A video's
            tokens are those of its frames in turn, each of them in patches of its own.
    """
    if feature.ndim == 5:
        return feature.transpose(1, 2).flatten(0, 1)
    if feature.ndim == 3:
        if sample.ndim == 5:
            feature = feature.unflatten(1, (sample.shape[2], -1)).flatten(0, 1)
        height, width = sample.shape[-2:]
        rows = round((feature.shape[1] * height / width) ** 0.5)
        return feature.transpose(1, 2).unflatten(2, (rows, -1))
    return feature if feature.ndim == 4 else feature[:, :, None, None]


class Head(nn.Module):
    """Score map of one feature: two conv-norm-GELU blocks, the second residual, then 1x1 to one.

    Args:
        channels: channels of the feature.
        width: channels inside the head; PCM's released heads keep the feature's own, which for
            Stable Diffusion 1.5 makes 664 M "lightweight" parameters.
        kernel_size: 1 (PCM's SDXL and SD3 heads) or 3 (its SD1.5 heads).
    """

    def __init__(self, channels: int, width: int = 64, kernel_size: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        groups = math.gcd(32, width)

        def block(inputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, width, kernel_size, padding=padding),
                nn.GroupNorm(groups, width),
                nn.GELU(),
            )

        self.inlet = block(channels)
        self.residual = block(width)
        self.score = nn.Conv2d(width, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """``(B, C, h, w)`` to ``(B, 1, h, w)``."""
        hidden = self.inlet(feature)
        score: Tensor = self.score(hidden + self.residual(hidden))
        return score


class FeatureDiscriminator(nn.Module):
    """Trainable heads over block outputs of a frozen, conditioned denoiser (PCM, section 3.3).

    The frozen network is handed over in each call and never registered here, so it is neither
    trained, averaged nor saved with the heads.

    Args:
        backbone: the network whose features will be read; only its shape is used.
        blocks: names of its blocks; all of ``backbone.feature_blocks`` by default.
        heads_per_block, width, kernel_size: size of the heads (see :class:`Head`).
    """

    def __init__(
        self,
        backbone: Backbone,
        blocks: Sequence[str] | None = None,
        heads_per_block: int = 1,
        width: int = 64,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        available = backbone.feature_blocks
        self.blocks = list(available if blocks is None else blocks)
        for name in self.blocks:
            if name not in available:
                raise FewstepError(
                    f"The teacher has no feature block '{name}'.{nearest(name, available)} "
                    f"Its blocks: {', '.join(available) or 'none'}."
                )
        if not self.blocks:
            raise FewstepError(
                f"{type(backbone).__name__} names no feature blocks, so a discriminator has "
                "nothing to look at; set adversarial_weight: 0."
            )
        self.heads = nn.ModuleList(
            nn.ModuleList(Head(available[name], width, kernel_size) for _ in range(heads_per_block))
            for name in self.blocks
        )

    def features(
        self, frozen: Denoiser, x: Tensor, t: Tensor, cond: Cond | None = None
    ) -> list[Tensor]:
        """Block outputs of the frozen network for ``x (B, ...)`` at ``t (B,)``, one map a block.

        Gradient reaches ``x`` through the frozen network.
        """
        with tapped(frozen.backbone, self.blocks) as taken:
            frozen.raw(x, t, cond)
        return [as_map(taken[name], x) for name in self.blocks]

    def score(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Score maps ``(B, 1, h, w)``, one a head."""
        dtype = next(self.parameters()).dtype
        return [
            head(feature.to(dtype))
            for feature, heads in zip(features, self.heads, strict=True)
            for head in cast(nn.ModuleList, heads)
        ]

    def forward(
        self, frozen: Denoiser, x: Tensor, t: Tensor, cond: Cond | None = None
    ) -> list[Tensor]:
        """Features, then scores."""
        return self.score(self.features(frozen, x, t, cond))
