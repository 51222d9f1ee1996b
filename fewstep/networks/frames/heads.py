"""Discriminator heads over frozen tokens of frames, after StyleGAN-T (Sauer et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError

Normalisation = Literal["group", "local_batch"]

GROUP = 16  # channels that share statistics
LOCAL_BATCH = 8  # samples that share statistics in StyleGAN-T and MCM
FIRST_ITERATIONS = 15  # of the power method on fresh weights


class SpectralConv1d(nn.Conv1d):
    """A convolution over tokens whose weight is divided by its largest singular value.

    Miyato et al. 2018. The power method's vectors are buffers that change in :meth:`advance` alone,
    never in a forward pass: within an update all passes see one function, however a batch is split
    and on whichever rank. torch's own spectral norm moves on in each pass.
    """

    left: Tensor
    right: Tensor

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size)
        rows = self.weight.detach().flatten(1)
        self.register_buffer("left", F.normalize(torch.randn_like(rows[:, 0]), dim=0))
        self.register_buffer("right", torch.zeros_like(rows[0]))
        self.advance(FIRST_ITERATIONS)

    @torch.no_grad()
    def advance(self, iterations: int = 1) -> None:
        """Takes the power method on, towards the singular vectors of the weight as it is now."""
        # Sums of products, which unlike matrix products autocast leaves in full precision.
        rows = self.weight.flatten(1)
        for _ in range(iterations):
            self.right.copy_(F.normalize((rows * self.left[:, None]).sum(0), dim=0))
            self.left.copy_(F.normalize((rows * self.right).sum(1), dim=0))

    def normalised_weight(self) -> Tensor:
        """The weight over its norm, with gradient through both."""
        # Clones, so that a graph that waits for its backward pass survives `advance`.
        left, right = self.left.clone(), self.right.clone()
        norm = ((self.weight.flatten(1) * right).sum(1) * left).sum()
        return self.weight / norm

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, L)`` to ``(N, D, L)``; the row of tokens is a ring."""
        padding = self.kernel_size[0] // 2
        return F.conv1d(_ring(x, padding), self.normalised_weight(), self.bias)


def _ring(x: Tensor, by: int) -> Tensor:
    """Tokens ``(..., L)`` with ``by`` more on both sides, from the other end.

    torch's circular padding goes round at most once, which is too little for a few tokens.
    """
    length = x.shape[-1]
    if by <= length:
        return F.pad(x, (by, by), mode="circular") if by else x
    rounds = -(-by // length)
    start = rounds * length - by
    return torch.cat([x] * (2 * rounds + 1), dim=-1)[..., start : start + length + 2 * by]


class LocalBatchNorm(nn.Module):
    """Batch normalisation over groups of at most 8 samples and their tokens, in training and after.

    The samples of a batch are split into equal groups, or nearly so. Their scores depend on one
    another.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, L)`` to the same."""
        groups = -(-len(x) // LOCAL_BATCH)
        wide = x if x.dtype == torch.float64 else x.float()
        normalised = torch.cat([self._over(group) for group in wide.tensor_split(groups)])
        return normalised * self.weight + self.bias

    def _over(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt()


def _block(channels: int, kernel: int, normalisation: Normalisation) -> nn.Sequential:
    norm: nn.Module
    if normalisation == "group":
        # Groups of several channels: one alone would lose its mean, and with one token everything.
        norm = nn.GroupNorm(math.gcd(channels, max(1, channels // GROUP)), channels)
    else:
        norm = LocalBatchNorm(channels)
    return nn.Sequential(SpectralConv1d(channels, channels, kernel), norm, nn.LeakyReLU(0.2))


class FrameHead(nn.Module):
    """A score for each token of one level.

    Args:
        channels: of the tokens.
        cond_dim: of the condition that is projected (Miyato & Koyama 2018); 0 has none.
        width: channels in which tokens and condition meet.
        kernel: tokens that the second block's convolution spans.
        normalisation: see :class:`FrameDiscriminator`.
    """

    def __init__(
        self, channels: int, cond_dim: int, width: int, kernel: int, normalisation: Normalisation
    ) -> None:
        super().__init__()
        self.inlet = _block(channels, 1, normalisation)
        self.residual = _block(channels, kernel, normalisation)
        self.outlet = SpectralConv1d(channels, width if cond_dim else 1)
        self.condition = nn.Linear(cond_dim, width) if cond_dim else None

    def forward(self, tokens: Tensor, cond: Tensor | None) -> Tensor:
        """``(N, L, C)`` and ``(N, D)`` to ``(N, L)``."""
        hidden = self.inlet(tokens.mT)
        hidden = (self.residual(hidden) + hidden) / math.sqrt(2)
        out = self.outlet(hidden)
        if self.condition is None:
            return out[:, 0]
        assert cond is not None
        direction = self.condition(cond)
        return (out * direction[:, :, None]).sum(1) / math.sqrt(direction.shape[1])


class FrameDiscriminator(nn.Module):
    """One independent head a level of a frozen network's tokens, scoring each token.

    Forward passes change nothing. Call :meth:`advance` once an update, outside any of its passes;
    ranks whose weights are alike stay alike.

    Args:
        channels: of each level's tokens, as :attr:`FrozenFeatures.channels` has them.
        cond_dim: of the condition; 0 scores frames without looking at one.
        width: channels in which tokens and condition meet (published: 64).
        kernel: tokens a convolution spans, odd (published: 9).
        normalisation: ``group`` normalises within each sample, so that scores depend on no other;
            ``local_batch`` is the released heads', over groups of up to 8 samples of a batch. With
            it, splitting a batch changes the scores.

    Raises:
        FewstepError: for an even kernel, or an unknown normalisation.
    """

    def __init__(
        self,
        channels: Sequence[int],
        cond_dim: int = 0,
        width: int = 64,
        kernel: int = 9,
        normalisation: Normalisation = "group",
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise FewstepError(f"A head's kernel is odd, not {kernel}.")
        if normalisation not in ("group", "local_batch"):
            raise FewstepError(f"normalisation is group or local_batch, not '{normalisation}'.")
        self.cond_dim = cond_dim
        self.heads = nn.ModuleList(
            FrameHead(number, cond_dim, width, kernel, normalisation) for number in channels
        )

    def advance(self) -> None:
        """Takes each spectral norm one iteration on; once an update, after the optimiser's step."""
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.advance()

    def levels(self, features: Sequence[Tensor], cond: Tensor | None = None) -> list[Tensor]:
        """Scores ``(N, L)`` of each level's tokens ``(N, L, C)``.

        Args:
            cond: ``(N, cond_dim)``; None if there is no condition.

        Raises:
            FewstepError: if the heads look at a condition and there is none, or another.
        """
        dtype = next(self.parameters()).dtype
        if self.cond_dim:
            found = None if cond is None else cond.shape[-1]
            if found != self.cond_dim:
                raise FewstepError(
                    f"The heads look at a condition of {self.cond_dim} numbers a frame, and there "
                    f"{'is none' if found is None else f'are {found}'}."
                )
        given = None if cond is None else cond.to(dtype)
        return [
            head(tokens.to(dtype), given) for head, tokens in zip(self.heads, features, strict=True)
        ]

    def score(self, features: Sequence[Tensor], cond: Tensor | None = None) -> Tensor:
        """All scores of a frame, ``(N, tokens of all levels)``; see :meth:`levels`."""
        return torch.cat(self.levels(features, cond), dim=1)

    def forward(self, features: Sequence[Tensor], cond: Tensor | None = None) -> Tensor:
        """The same as :meth:`score`."""
        return self.score(features, cond)
