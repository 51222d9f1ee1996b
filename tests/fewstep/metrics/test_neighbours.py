from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.metrics.neighbours import blocks, nearest, squared_distances


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_distances_are_those_of_the_difference() -> None:
    first, second = randn(7, 5), randn(9, 5, seed=1)
    direct = (first[:, None] - second).double().square().sum(-1)
    torch.testing.assert_close(squared_distances(first, second), direct)


def test_equal_vectors_are_at_no_distance_at_all_however_long() -> None:
    vectors = 1000 + randn(20, 300)
    found = squared_distances(vectors, vectors)
    assert bool((found.diagonal() == 0).all())
    assert int((found == 0).sum()) == 20
    # A relative difference of float32's last digits is one.
    assert float(squared_distances(vectors[:1], vectors[:1] * (1 + 3e-6))[0, 0]) > 0


@pytest.mark.parametrize("size", [3, 7, 100])
def test_blocks_are_the_whole_in_parts(size: int) -> None:
    first, second = randn(10, 4), randn(7, 4, seed=1)
    found = torch.full((10, 7), torch.nan, dtype=torch.float64)
    for rows, columns, distances in blocks(first, second, size):
        assert max(distances.shape) <= size
        found[rows, columns] = distances
    torch.testing.assert_close(found, squared_distances(first, second))


@pytest.mark.parametrize("size", [3, 8, 100])
def test_the_nearest_others_are_found_over_blocks(size: int) -> None:
    table = randn(20, 4)
    whole = torch.cdist(table.double(), table.double()).square().sort(1).values[:, 1:4]
    torch.testing.assert_close(nearest(table, 3, size), whole)
