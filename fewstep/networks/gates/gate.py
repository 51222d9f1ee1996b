"""One gate: the recursion ``z <- rho z + alpha F(z) + beta`` on a branch or around a block.

Parameters are differences from the ungated network: ``delta = alpha - 1``, ``kappa = rho - 1`` and
beta itself. They are float32, whatever the network is: a delta of -0.91 in bfloat16 would be off by
two per cent of its alpha. What a gate gives has the dtype of what it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.networks.gates.blocks import Stream
from fewstep.networks.gates.spec import ResidualGates
from fewstep.networks.gates.time import NUM_FEATURES, needed_features


class KeptInFloat32(nn.Module):
    """A module whose parameters stay float32 when it is moved to fewer bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Half precision, and the 8 bits in which diffusers' layerwise casting keeps layers.
            narrower = moved.is_floating_point() and moved.itemsize < 4
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(kept, recurse)


def master(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """Zeros on the device of ``like``, in float32 or, of float64 networks, in float64."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return nn.Parameter(torch.zeros(shape, device=like.device, dtype=dtype))


class Gate(KeptInFloat32):
    """Alpha, beta and rho of one residual unit.

    Args:
        spec: which of them there are, and of what shape.
        channels: of the unit's output.
        channel_dim: where they are in it: -1 of tokens, 1 of maps.
        like: a weight of the network.
        stream, position: of a gate around a block, which argument its stream is, and where.

    Attributes:
        delta: ``alpha - 1``, ``(1,)`` or ``(C,)``. (FSDP2 shards no tensors without dimensions.)
        kappa: ``rho - 1``, ``(1,)``.
        beta: ``(C,)``.
        delta_of_time: what alpha adds for each feature of the time, ``(K, 1)`` or ``(K, C)``.
        beta_of_time: the same of beta, ``(K, C)``.
    """

    delta: nn.Parameter | None
    kappa: nn.Parameter | None
    beta: nn.Parameter | None
    delta_of_time: nn.Parameter | None
    beta_of_time: nn.Parameter | None

    def __init__(
        self,
        spec: ResidualGates,
        channels: int,
        channel_dim: int,
        like: Tensor,
        stream: Stream | None = None,
        position: int | None = None,
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.stream = stream
        self.position = position
        width = channels if spec.alpha_shape == "channel" else 1
        timed = spec.time_conditioned
        shapes: dict[str, tuple[int, ...] | None] = {
            "delta": (width,) if spec.has_alpha else None,
            "kappa": (1,) if spec.has_rho else None,
            "beta": (channels,) if spec.has_beta else None,
            "delta_of_time": (NUM_FEATURES, width) if timed and spec.has_alpha else None,
            "beta_of_time": (NUM_FEATURES, channels) if timed and spec.has_beta else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else master(shape, like))

    def forward(self, output: Tensor, stream: Tensor | None = None) -> Tensor:
        """What takes the place of a unit's output.

        Args:
            output: a branch's ``F(z)``, whose identity path lies outside; or, with ``stream``, a
                block's ``y = z + F(z)``.
            stream: the block's input ``z``, of the same shape.

        Returns:
            ``alpha F + beta``, or ``rho z + alpha (y - z) + beta``. With gates of zeros this is
            the output itself, to the bit.
        """
        alpha, beta = self._alpha(output), self._beta(output)
        if stream is None:
            gated = output if alpha is None else output * alpha
        else:
            stream = _laid_out_as(output, stream.to(output.dtype))
            # y - (y - z) (1 - alpha) near an alpha of 1: unlike z + alpha (y - z) exact there.
            gated = output if alpha is None else torch.lerp(stream, output, alpha)
            if self.kappa is not None:
                gated = gated + self._spread(self.kappa, output) * stream
        return gated if beta is None else gated + beta

    def _alpha(self, like: Tensor) -> Tensor | None:
        if self.delta is None:
            return None
        alpha = 1 + self.delta
        if self.delta_of_time is not None:
            alpha = alpha + _of_time(self.delta_of_time)
        return self._spread(alpha, like)

    def _beta(self, like: Tensor) -> Tensor | None:
        if self.beta is None:
            return None
        beta: Tensor = self.beta
        if self.beta_of_time is not None:
            beta = beta + _of_time(self.beta_of_time)
        return self._spread(beta, like)

    def _spread(self, value: Tensor, like: Tensor) -> Tensor:
        """``(C,)`` or ``(B, C)``, with one or all channels, as a factor of ``like``."""
        shape = [1] * like.ndim
        shape[self.channel_dim] = value.shape[-1]
        if value.ndim == 2:
            # Frames and pixels may be folded into the batch, behind the samples.
            value = value.repeat_interleave(len(like) // len(value), dim=0)
            shape[0] = len(value)
        return value.to(like.dtype).reshape(shape)


def _of_time(weight: Tensor) -> Tensor:
    """What the features of each sample's time make of a weight ``(K, C)``: ``(B, C)``.

    A sum of products, which unlike a matrix product autocast leaves in the weight's precision.
    """
    return (needed_features().to(weight.dtype)[:, :, None] * weight).sum(dim=1)


def _laid_out_as(output: Tensor, stream: Tensor) -> Tensor:
    """A stream in its output's layout in memory, which their sums then have too.

    The order in which what comes behind adds numbers up, and so its last bit, depends on that.
    """
    if stream.stride() == output.stride():
        return stream
    return torch.empty_like(output).copy_(stream)


class SkipGate(KeptInFloat32):
    """Scales of the long skips that an up block takes: ``(1 + sigma) skip``.

    Args:
        count: how many it takes.
        like: a weight of the network.
        position: where they are among the arguments, if they are not given by name.
    """

    def __init__(self, count: int, like: Tensor, position: int | None = None) -> None:
        super().__init__()
        self.position = position
        self.sigma = master((count,), like)

    def forward(self, skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Scales each of ``count`` skips."""
        scales = (1 + self.sigma).unbind()
        return tuple(s * scale.to(s.dtype) for s, scale in zip(skips, scales, strict=True))


class FuseGate(KeptInFloat32):
    """Scale of the long skip in a U-ViT's fuse map, which takes ``[d, skip]`` side by side.

    Args:
        like: the map's weight, ``(D, 2 D)``.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.sigma = master((1,), like)

    def forward(self, both: Tensor) -> Tensor:
        """``[d, (1 + sigma) skip]`` of ``(..., 2 D)``."""
        half = both.shape[-1] // 2
        scale = 1 + self.sigma
        return both * torch.cat([torch.ones_like(scale), scale]).repeat_interleave(half).to(
            both.dtype
        )
