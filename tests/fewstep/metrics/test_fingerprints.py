"""Networks are known by their weights, whatever is put around them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fewstep.metrics.fingerprints import fingerprint, shares_weights


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Scaled(nn.Module):
    """Another network within, shown something else."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within = within
        self.register_buffer("mean", torch.ones(3))


def tuned() -> nn.Module:
    """A copy whose last layer was trained anew."""
    made = copy.deepcopy(network())
    nn.init.normal_(made[2].weight)  # type: ignore[arg-type]
    return made


DISGUISES: list[Callable[[], nn.Module]] = [
    network,
    lambda: nn.Sequential(nn.Identity(), network()),
    lambda: Scaled(network()),
    lambda: network()[:1],
    lambda: network().half(),
    lambda: network().bfloat16(),
    tuned,
]


@pytest.mark.parametrize("disguise", DISGUISES)
def test_copies_wrappers_and_parts_share_their_weights(disguise: Callable[[], nn.Module]) -> None:
    assert shares_weights(network(), disguise())
    assert shares_weights(disguise(), network())
    assert shares_weights(disguise().bfloat16(), network().half())


def test_other_networks_share_none_even_where_a_small_table_is_the_same() -> None:
    other = network(1)
    assert not shares_weights(network(), other)
    with torch.no_grad():
        other[2].weight.copy_(network()[2].weight)  # type: ignore[operator]
    assert not shares_weights(network(), other)
    assert not shares_weights(nn.Identity(), nn.Identity())


def test_a_fingerprint_is_of_weights_and_buffers_alone() -> None:
    found = fingerprint(network())
    assert fingerprint(nn.Sequential(network())) == found
    assert fingerprint(nn.ModuleDict({"a": network()})) == found
    assert fingerprint(network(1)) != found
    seen = network()
    seen[1].running_mean.add_(1)  # type: ignore[operator]
    assert fingerprint(seen) != found
