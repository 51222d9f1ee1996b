"""The time that gates may depend on: known while the network runs, and to what is recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import argument_of, position_of

NUM_FEATURES = 16
NAMES = ("timestep", "t")


class _Now:
    """The features of the running network's time, ``(B, NUM_FEATURES)`` or None outside of one.

    One for the process and no thread's own, as activations may be computed once more in one of
    autograd's threads.
    """

    features: Tensor | None = None


_NOW = _Now()
_BEFORE: list[Tensor | None] = []


@contextmanager
def at(features: Tensor | None) -> Iterator[None]:
    """Lets gates see these features for a while."""
    before, _NOW.features = _NOW.features, features
    try:
        yield
    finally:
        _NOW.features = before


def now() -> Tensor | None:
    """The features that gates see at this moment."""
    return _NOW.features


def needed_features() -> Tensor:
    """The same, for a gate that needs them.

    Raises:
        FewstepError: outside of the network's forward pass.
    """
    if _NOW.features is None:
        raise FewstepError(
            "Time-conditioned gates know the time only while their whole network runs. To "
            "recompute activations use fewstep's own checkpointing, which tells them the time."
        )
    return _NOW.features


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines ``(B, NUM_FEATURES)`` of times ``(B,)`` in the network's own unit.

    Their periods run from 2 to 2000, in a geometric sequence.
    """
    t = t.reshape(-1, 1).to(torch.float64 if t.dtype == torch.float64 else torch.float32)
    half = NUM_FEATURES // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype) / (half - 1)
    angles = t * (math.pi * 1000.0**-steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def watch_time(network: nn.Module) -> None:
    """Lets the gates of a network know the time it is called with.

    Raises:
        FewstepError: if its forward pass takes no time under a known name.
    """
    find_time_argument(network)
    network.register_forward_pre_hook(enter_time, with_kwargs=True)
    network.register_forward_hook(leave_time, always_call=True)


def find_time_argument(network: nn.Module) -> tuple[str, int]:
    """Name and position of the time among the arguments of a network's forward pass."""
    for name in NAMES:
        position = position_of(network, name)
        if position is not None:
            return name, position
    raise FewstepError(
        f"gates.time_conditioned: the forward pass of {type(network).__name__} has no argument "
        f"named {' or '.join(NAMES)}; set it to false."
    )


def enter_time(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Forward pre-hook of a network: notes the features of its time."""
    t = argument_of(*find_time_argument(network), args, kwargs)
    weight = next(network.parameters())
    _BEFORE.append(_NOW.features)
    _NOW.features = time_features(torch.as_tensor(t, device=weight.device))


def leave_time(_network: nn.Module, _args: Sequence[Any], _output: Any) -> None:
    """Forward hook of a network, run even if it fails."""
    _NOW.features = _BEFORE.pop()
