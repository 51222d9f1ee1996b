"""Features of single samples, kept as a table: for metrics that compare sample with sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        mine = self.tensors() if len(self) else {}
        found = type(self)(self.outputs, self.most)
        found.restore({name: ranks.rows(mine.get(name)) for name in self._tables})
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
        whole = {name: torch.cat(pieces) for name, pieces in self._tables.items()}
        order = whole[NUMBERS].argsort(stable=True)[: self.most]
        self._tables = {name: [table[order]] for name, table in whole.items()}
