"""Means over samples of numbers that each sample has by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.base import Samples, Statistics
from fewstep.metrics.ranks import Ranks

Values = Callable[[Mapping[str, Tensor], Samples], Sequence[Tensor]]


class Means(Statistics):
    """Sums in float64, from which means follow.

    Args:
        names: of the numbers.
        values: gives each number for a batch, ``(B,)``, from features and samples.
    """

    def __init__(self, names: Sequence[str], values: Values) -> None:
        self.names = tuple(names)
        self.values = values
        self.sums: Tensor | None = None

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        rows = torch.stack([v.detach().double() for v in self.values(features, samples)], 1)
        sums = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))])
        self.sums = sums if self.sums is None else self.sums + sums

    def merged(self, ranks: Ranks) -> Self:
        found = type(self)(self.names, self.values)
        found.sums = ranks.sum(self.sums)
        return found

    def tensors(self) -> dict[str, Tensor]:
        if self.sums is None:
            raise ValueError("There are no samples.")
        return {"sums": self.sums}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.sums = tensors["sums"]

    def means(self) -> dict[str, float]:
        """Each number's mean by name.

        Raises:
            FewstepError: if there are no samples.
        """
        if self.sums is None or self.sums[-1] == 0:
            raise FewstepError("There are no samples to take a mean of.")
        *sums, count = self.sums.tolist()
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}
