"""Amounts that samples have by themselves, to be read against the data's.

Neither much nor little is good by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.base import Better, Metric, Samples, Statistics
from fewstep.metrics.means import Means


class Amount(Metric):
    """The mean amount of something in a set, and how it compares with the reference's.

    Gives ``NAME``, and with a reference ``NAME_ratio``, generated over reference, and
    ``NAME_error``, how far that ratio is from 1.

    Args:
        name: of the amount.

    Attributes:
        nothing: what is said of a reference that has none of it.
    """

    nothing: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name
        self.own_values = frozenset({name})
        self.better: dict[str, Better] = {
            name: "higher",
            f"{name}_ratio": "higher",
            f"{name}_error": "lower",
        }

    def statistics(self) -> Means:
        return Means([self.name], self.amounts)

    @abstractmethod
    def amounts(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        """The amount ``(B,)`` of each sample, alone in a list."""

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        values = generated.means()
        if reference is None:
            return values
        assert isinstance(reference, Means)
        data = reference.means()[self.name]
        if data == 0:
            raise FewstepError(
                f"{self.nothing}, so that {self.name} has nothing to be compared with. Look at the "
                "data, or leave the metric out."
            )
        ratio = values[self.name] / data
        return {**values, f"{self.name}_ratio": ratio, f"{self.name}_error": abs(ratio - 1)}

    def protocol(self) -> dict[str, Any]:
        looks = {} if self.features is None else {"features": self.features.protocol()}
        return {"metric": self.name, **looks}
