"""A field turns one part of a record into one value of the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamodules.index import Shape, ShardIndex

Random = Callable[[], np.random.Generator]
"""Makes the generator of a record's augmentations; made only where something is drawn."""


@dataclass(frozen=True)
class Decoded:
    """A decoded value and what there is to say about it.

    Attributes:
        note: what should be counted about it, such as a clip that was too short.
        cond: conditions that follow from how it was decoded, each a tensor without the batch's
            dimension. Of a sample alone they join the batch's ``cond``.
    """

    value: Any
    note: str | None = None
    cond: dict[str, Tensor] = field(default_factory=dict)


class Field(ABC):
    """Decodes one part of a record.

    Anything wrong with the data is a ``ValueError`` (or ``OSError``) whose message says what; the
    record is then skipped, counted and named. Nothing is ever unpickled.

    Args:
        keys: extensions under which records may hold this part; the first present is read.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)

    def extension(self, present: Collection[str]) -> str:
        """Which of a record's parts to read.

        Raises:
            ValueError: if the record has none of :attr:`keys`.
        """
        for key in self.keys:
            if key in present:
                return key
        raise ValueError(f"it has no {' or '.join(self.keys)}, only {', '.join(present)}")

    @abstractmethod
    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes the bytes of a part.

        Args:
            data: the part.
            extension: under which it was found, one of :attr:`keys`.
            random: for random crops, flips, clips and the like; None asks for the fixed choice
                that evaluation needs (centre crop, no flip, middle clip).
        """

    def collate(self, values: list[Any]) -> Any:
        """Puts the values of a batch together: a tensor ``(B, ...)``, or a list of strings."""
        return torch.stack(values)

    def finish(self, values: Any) -> Any:
        """What is left to do to a collated batch (scaling to [-1, 1], say), once for all."""
        return values

    def describe(self) -> dict[str, Any]:
        """The options, in plain values, for the record of a result."""
        plain = {name: _plain(value) for name, value in vars(self).items() if name[0] != "_"}
        return {"field": type(self).__name__, **plain}

    def buckets(self, index: ShardIndex) -> npt.NDArray[np.int64] | None:
        """Which records should share a batch, ``(n,)`` bucket numbers; None: any may."""
        return None

    def for_batch(self, shapes: list[Shape] | None) -> Field:
        """The field that decodes a batch whose images have these heights and widths."""
        return self


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, dict, type(None))) else str(value)
