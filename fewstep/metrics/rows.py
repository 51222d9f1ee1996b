"""Features of single samples, kept as a table: for metrics that compare sample with sample."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from fewstep.metrics.base import Samples, Statistics
from fewstep.metrics.ranks import Ranks

NUMBERS = "numbers"


class Rows(Statistics):
    """Chosen features of each sample, in the order of the samples' numbers.

    Memory grows with the number of samples up to ``most``; beyond it those with the smallest
    numbers are kept, which for generated samples are the first ones and for records of a data set
    a choice by hash, the same for any number of ranks.

    Args:
        outputs: which features; ``pixels`` takes the samples themselves.
        most: rows to keep.
    """

    def __init__(self, outputs: Sequence[str], most: int | None = None) -> None:
        self.outputs = tuple(outputs)
        self.most = most
        self._tables: dict[str, list[Tensor]] = {name: [] for name in (NUMBERS, *outputs)}

    def identity(self) -> Hashable:
        return (type(self), self.outputs, self.most)

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        self._tables[NUMBERS].append(samples.numbers.cpu())
        for name in self.outputs:
            values = samples.pixels if name == "pixels" else features[name]
            self._tables[name].append(values.detach().cpu())
        if self.most is not None and len(self) > 2 * self.most:
            self._sort()

    def __len__(self) -> int:
        return sum(map(len, self._tables[NUMBERS]))

    def __getitem__(self, output: str) -> Tensor:
        """One feature of all samples ``(N, ...)``, by number.

        Raises:
            ValueError: if there are no samples.
        """
        return self.tensors()[output]

    def merged(self, ranks: Ranks) -> Self:
        """All ranks' rows on the first rank; none elsewhere.

        Ranks agree on the numbers first and send only rows that are among the smallest of all.
        """
        mine = self.tensors() if len(self) else {}
        numbers = mine[NUMBERS].tolist() if mine else []
        kept = _kept(ranks.lists(numbers), self.most)[ranks.rank]
        found = type(self)(self.outputs, self.most)
        gathered: dict[str, Tensor] = {}
        for name in self._tables:
            whole = ranks.rows(mine[name][:kept] if mine else None)
            if whole is not None:
                gathered[name] = whole
        if gathered:
            found.restore(gathered)
        return found

    def tensors(self) -> dict[str, Tensor]:
        if not len(self):
            raise ValueError("There are no samples.")
        self._sort()
        return {name: pieces[0] for name, pieces in self._tables.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._tables = {name: [tensors[name]] for name in self._tables}
        self._sort()

    def _sort(self) -> None:
        if self._is_sorted():
            return
        whole = {name: torch.cat(pieces) for name, pieces in self._tables.items()}
        order = whole[NUMBERS].argsort(stable=True)[: self.most]
        self._tables = {name: [table[order]] for name, table in whole.items()}

    def _is_sorted(self) -> bool:
        """Whether the tables are whole, in order and short enough, and need not be copied."""
        if len(self._tables[NUMBERS]) > 1 or (self.most is not None and len(self) > self.most):
            return False
        (numbers,) = self._tables[NUMBERS]
        return bool((numbers[1:] >= numbers[:-1]).all())


def _kept(numbers: Sequence[Sequence[int]], most: int | None) -> list[int]:
    """How many rows of each rank are among the first ``most`` of all.

    Args:
        numbers: of each rank's rows, ascending.
        most: rows to keep; None keeps all.
    """
    counts = [len(each) for each in numbers]
    if most is None or sum(counts) <= most:
        return counts
    everyone = torch.tensor(list(itertools.chain(*numbers)))
    ranks = torch.repeat_interleave(torch.tensor(counts))
    chosen = ranks[everyone.argsort(stable=True)[:most]]
    return torch.bincount(chosen, minlength=len(counts)).tolist()
