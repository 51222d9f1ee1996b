"""Distances between two tables of vectors in blocks, of which a few exist at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 4096  # rows and columns: 134 MB of distances
ROUNDING = 1e-12  # squared distances below this share of the squared lengths are rounding


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Squared Euclidean distances ``(N, M)`` in float64; those of equal vectors are exactly 0."""
    first, second = first.double(), second.double()
    lengths = first.square().sum(1)[:, None] + second.square().sum(1)
    found = lengths - 2 * first @ second.T
    return torch.where(found > ROUNDING * lengths, found, 0)


def blocks(
    first: Tensor, second: Tensor, size: int = BLOCK
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of all pairs of two tables, with the rows of either that they are of."""
    for row in range(0, len(first), size):
        rows = slice(row, row + size)
        for column in range(0, len(second), size):
            columns = slice(column, column + size)
            yield rows, columns, squared_distances(first[rows], second[columns])


def nearest(table: Tensor, most: int, size: int = BLOCK) -> Tensor:
    """Each vector's squared distances ``(N, most)`` to its nearest others, ascending.

    Args:
        table: ``(N, D)`` of more than ``most`` vectors.
        most: neighbours.
        size: of a block.
    """
    found = torch.full((len(table), most + 1), torch.inf, dtype=torch.float64, device=table.device)
    for rows, _, distances in blocks(table, table, size):
        both = torch.cat([found[rows], distances], dim=1)
        found[rows] = both.topk(most + 1, largest=False).values
    return found[:, 1:]  # the nearest of all is the vector itself
