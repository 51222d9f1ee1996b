"""Pieces of the one optimisation path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from fewstep.batches import rows_of
from fewstep.contracts import Batch
from fewstep.errors import FewstepError

BLOCK = 8  # samples that share a generator


@dataclass(frozen=True)
class Draws:
    """All that is random in a step, tensors ``(B, ...)``; each method has a subclass of its own."""

    def rows(self, rows: slice) -> Self:
        """The draws of some of the batch's samples."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The draws of several lots of samples, one after the other."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


D = TypeVar("D", bound=Draws)


def in_blocks(rows: range, draw: Callable[[int], D]) -> D:
    """Draws of some of the samples of all ranks' batches.

    Blocks of samples are drawn, each with a generator of its own. So what is drawn for a sample
    depends on its place among those of all ranks and on nothing else, and no rank draws for all.

    Args:
        rows: the samples' places.
        draw: makes the draws of the numbered block, of :data:`BLOCK` samples.
    """
    parts = [draw(number).rows(part) for number, part in _blocks(rows)]
    return type(parts[0]).joined(parts)


def noise_in_blocks(rows: range, draw: Callable[[int], Tensor]) -> Tensor:
    """As :func:`in_blocks`, where what is drawn is one tensor ``(BLOCK, ...)``."""
    return torch.cat([draw(number)[part] for number, part in _blocks(rows)])


def _blocks(rows: range) -> Iterator[tuple[int, slice]]:
    """Each block that has some of the rows, and which of its own these are."""
    for number in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        first = number * BLOCK
        yield number, slice(max(rows.start - first, 0), min(rows.stop - first, BLOCK))


def check_accumulate(accumulate: int, batch_size: int) -> None:
    """Refuses more micro-batches than a device's batch has samples.

    Raises:
        FewstepError: if there are more.
    """
    if accumulate > batch_size:
        raise FewstepError(
            f"accumulate: {accumulate} splits a batch of {batch_size} a device, so that parts of "
            f"it would be empty. Set accumulate: {batch_size} or less, or "
            f"data.init_args.batch_size: {accumulate} or more."
        )


def micro_batches(batch: Batch, draws: Draws, count: int) -> Iterator[tuple[float, Batch, Draws]]:
    """Splits a batch and its draws; yields (share of the batch, micro-batch, draws).

    Draws are made for the whole batch before it is split, so accumulation does not change them.
    """
    total = len(batch["sample"])
    if count == 1:
        yield 1.0, batch, draws
        return
    for number in range(count):
        start, stop = total * number // count, total * (number + 1) // count
        # Ranks gather sharded roles together, so also a batch that damage has made shorter than
        # `count` has as many parts: some then hold a sample that does not count.
        rows = slice(start, stop) if start < stop else slice(0, 1)
        yield (stop - start) / total, rows_of(batch, rows), draws.rows(rows)


def learning_rate_factor(
    update: int, warmup: int, total: int, decay: Literal["constant", "cosine", "linear"]
) -> float:
    """Multiplier of the learning rate before the given update (counted from 0)."""
    if update < warmup:
        return (update + 1) / warmup
    if decay == "constant" or total <= warmup:
        return 1.0
    progress = min(1.0, (update - warmup) / (total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
