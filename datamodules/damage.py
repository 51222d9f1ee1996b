"""What goes wrong with records: named once, counted, and too much of it stops the run."""

from __future__ import annotations

import warnings
from collections import Counter

from fewstep.contracts import Batch
from fewstep.errors import FewstepError


class Damage:
    """The damaged records one process has met.

    Args:
        limit: how many it tolerates.

    Attributes:
        records: what is wrong with which record.
        notes: how often each kind of note was met, such as ``short clip``.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.records: dict[str, str] = {}
        self.notes: Counter[str] = Counter()

    def take(self, batch: Batch) -> Batch:
        """Removes reports of damage from a batch and takes note of them.

        Raises:
            FewstepError: if a loading process failed, or more records than ``limit`` are damaged.
        """
        if failure := batch.pop("failed", None):
            raise FewstepError(failure)
        for note in batch.pop("notes", []):
            kind = note.split(": ")[1]
            if not self.notes[kind]:
                warnings.warn(f"First {kind}: {note}. Others are only counted.", stacklevel=2)
            self.notes[kind] += 1
        for message in batch.pop("skipped", []):
            name, _, reason = message.partition(": ")
            if name not in self.records:
                self.records[name] = reason
                # Not on rank zero alone: each rank meets records of its own.
                warnings.warn(f"Skipped a damaged record: {message}", stacklevel=2)
        if len(self.records) > self.limit:
            name, reason = next(reversed(self.records.items()))
            raise FewstepError(
                f"{len(self.records)} damaged records are more than max_damaged: {self.limit} "
                f"(last: {name}: {reason}). Check the shards with `fewstep shards check`, "
                "or raise the limit."
            )
        return batch
