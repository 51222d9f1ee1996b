"""Which network is it: a name for its weights, and whether two networks have the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def fingerprint(network: nn.Module) -> str:
    """A name for a network's weights and buffers, the same for whatever wraps them."""
    return digest(tensor for _, tensor in sorted(network.state_dict().items()))


def digest(tensors: Iterable[Tensor]) -> str:
    """A name for tensors, of their shapes and their values in float32."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def shares_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether more than half of the smaller network is also in the other, in equal tensors.

    So a copy, a wrapper and a part of a network are known, in another precision and on another
    device too; tables that any network may hold are too small to count.
    """
    if one is other:
        return True
    small, large = sorted((_weights(one), _weights(other)), key=_size)
    alike = defaultdict(list)
    for tensor in large:
        alike[tensor.shape].append(tensor)
    common = [t for t in small if any(_equal(t, candidate) for candidate in alike[t.shape])]
    return 2 * _size(common) > _size(small)


def _weights(network: nn.Module) -> list[Tensor]:
    return list(network.parameters()) or list(network.buffers())


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are equal in the coarser of their precisions."""
    if one is other:
        return True
    one, other = one.detach().to(other.device), other.detach()
    if {one.dtype, other.dtype} == {torch.float16, torch.bfloat16}:  # neither holds the other's
        return torch.allclose(one.float(), other.float(), rtol=2**-7, atol=2**-14)
    coarse = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(coarse), other.to(coarse))
