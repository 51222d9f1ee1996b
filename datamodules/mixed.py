"""Several data sets in one stream of batches, with given weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from datamodules.several import Several
from datamodules.streaming import Shards
from fewstep.contracts import Batch
from fewstep.errors import FewstepError


class Turns:
    """Whose batch comes next: at any moment each source is within one batch of its share.

    The next is the source that is furthest behind; so the turns after any counts follow from the
    counts alone, and all ranks take the same.

    Args:
        weights: of the sources, positive.
        counts: batches each has given before.
    """

    def __init__(self, weights: Sequence[float], counts: Sequence[int] | None = None) -> None:
        self.shares = [weight / sum(weights) for weight in weights]
        self.counts = list(counts) if counts is not None else [0] * len(weights)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        coming = sum(self.counts) + 1
        behind = [
            share * coming - count for share, count in zip(self.shares, self.counts, strict=True)
        ]
        turn = behind.index(max(behind))
        self.counts[turn] += 1
        return turn


def named(batch: Batch, source: str) -> Batch:
    """The batch, with the name of its source."""
    batch["source"] = source
    return batch


class _InTurns:
    """A loader that asks other endless loaders by turns."""

    def __init__(self, data: Mixed, loaders: Sequence[Iterable[Batch]]) -> None:
        self.data, self.loaders = data, loaders

    def __iter__(self) -> Iterator[Batch]:
        streams = [iter(loader) for loader in self.loaders]
        for turn in self.data.turns():
            yield named(next(streams[turn]), self.data.names[turn])


class _OneAfterAnother:
    """All batches of each of several finite loaders."""

    def __init__(self, data: Mixed, loaders: Sequence[DataLoader[Any]]) -> None:
        self.data, self.loaders = data, loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Batch]:
        for name, loader in zip(self.data.names, self.loaders, strict=True):
            yield from (named(batch, name) for batch in loader)


class Mixed(Several):
    """Batches of several data sets, such as images and videos, in one stream.

    A batch is of one source, which it names in ``source``, and all ranks have the same source at
    the same update. Each source keeps its own exact order and position.

    Args:
        sources: the data sets by name; their streams must be endless (``remainder: carry``).
        weights: share of the batches each gives, by the same names.
        reference: the source that metrics compare with; the first where null.

    Raises:
        FewstepError: if names differ, a weight is not positive or a stream ends.
    """

    def __init__(
        self,
        sources: dict[str, Shards],
        weights: dict[str, float],
        reference: str | None = None,
    ) -> None:
        if set(sources) != set(weights) or not sources:
            raise FewstepError(
                f"data.init_args.weights must name the same data sets as sources: "
                f"{sorted(sources)}, not {sorted(weights)}."
            )
        if min(weights.values()) <= 0:
            raise FewstepError("data.init_args.weights must be positive; leave out the other sets.")
        super().__init__(sources, reference)
        self.names = list(sources)
        self.weights = [weights[name] for name in self.names]
        self._counts = [0] * len(self.names)
        self._counted_at = 0

    # ------------------------------------------------------------------ set up

    def setup(self, stage: str | None = None) -> None:
        """Sets each source up, and has it count its own batches only."""
        for number, source in enumerate(self.sources.values()):
            source.batches_consumed = self._counter(number)  # type: ignore[method-assign]
        super().setup(stage)

    def _counter(self, number: int) -> Any:
        return lambda: self.consumed()[number]

    # ------------------------------------------------------------------ position

    def consumed(self) -> list[int]:
        """Batches of each source that the optimiser has consumed."""
        assert self.trainer is not None
        turns = Turns(self.weights, self._counts)
        for _ in range(self.trainer.global_step - self._counted_at):
            next(turns)
            # Counting goes on from here next time, not from the beginning.
            self._counts, self._counted_at = turns.counts, self._counted_at + 1
        return list(self._counts)

    def turns(self) -> Turns:
        """Whose batches come next, from the current position."""
        return Turns(self.weights, self.consumed())

    def state_dict(self) -> dict[str, Any]:
        """The position of each source."""
        assert self.trainer is not None
        return {
            "counts": dict(zip(self.names, self.consumed(), strict=True)),
            "updates": self.trainer.global_step,
            **super().state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores each source's position.

        Raises:
            FewstepError: if the checkpoint's stream mixed other sources.
        """
        counts = state_dict["counts"]
        if set(counts) != set(self.names):
            raise FewstepError(
                f"The checkpoint's stream mixed {sorted(counts)}, this run's {sorted(self.names)}; "
                "resume with the same sources."
            )
        self._counts = [counts[name] for name in self.names]
        self._counted_at = state_dict["updates"]
        super().load_state_dict(state_dict)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> Iterable[Batch]:
        """The sources' training batches by turns."""
        return _InTurns(self, [source.train_dataloader() for source in self.sources.values()])

    def val_dataloader(self) -> Iterable[Batch]:
        """The sources' held-out batches, one source after another."""
        return _OneAfterAnother(self, [source.val_dataloader() for source in self.sources.values()])

    # ------------------------------------------------------------------ batches

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leaves it to the batch's source."""
        return self.sources[batch["source"]].on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leaves it to the batch's source."""
        return self.sources[batch["source"]].on_after_batch_transfer(batch, dataloader_idx)
