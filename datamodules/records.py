"""From a plan to a batch: reads the parts of records, decodes them and sets the damaged aside."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.catalogue import Catalogue
from datamodules.fields import Decoded, Field, Random
from datamodules.index import BLOCK, Record, Shape, names
from datamodules.sources import Sources
from datamodules.stream import Plan
from fewstep.contracts import Batch, Conditions
from fewstep.errors import FewstepError
from fewstep.seeding import numpy_generator

PROMPT = "prompt"


@dataclass(frozen=True)
class Sample:
    """One decoded record: the sample, its conditions by name, its key and what to count.

    Attributes:
        told: conditions that follow from how the sample was decoded, by name.
    """

    value: Any
    conditions: dict[str, Any]
    key: str
    notes: list[str]
    told: dict[str, Tensor]


@dataclass(frozen=True)
class Skipped:
    """A record that could not be decoded, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ShardReader:
    """Reads parts of records by offset, through few open files.

    Args:
        sources: where shards come from.
        open_files: how many shards stay open.
    """

    def __init__(self, sources: Sources, open_files: int = 64) -> None:
        self.sources = sources
        self.open_files = open_files
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, record: Record, extension: str) -> bytes:
        """The bytes of one part.

        Raises:
            FewstepError: if the shard is not the one that was indexed.
        """
        offset, size = record.parts[extension]
        found = os.pread(self._file(record.shard), BLOCK + size, offset - BLOCK)
        data = found[BLOCK:]
        if len(data) != size or not names(found[:BLOCK], f"{record.key}.{extension}"):
            raise FewstepError(
                f"The shard '{record.shard}' has changed since it was indexed: '{record.key}."
                f"{extension}' is not where its index says. Run: fewstep shards index --force "
                f"{record.shard}"
            )
        return data

    def _file(self, shard: str) -> int:
        if shard not in self._files:
            self._files[shard] = self.sources.descriptor(shard)
            if len(self._files) > self.open_files:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Closes the files; one that is read again is opened again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        with suppress(AttributeError, TypeError, OSError):  # while the interpreter ends
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors do not travel


class Records(Dataset[Batch]):
    """Batches by plan; what a DataLoader's workers run.

    Args:
        catalogue: which records there are.
        sources: where their shards come from.
        sample: decodes the sample.
        conditions: decode the conditions, by name.
        seed: of augmentations; None asks for evaluation's fixed choices.
        full_names: whether a batch's keys name the shard too, so that no two records share one.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        sources: Sources,
        sample: Field,
        conditions: dict[str, Field],
        seed: int | None = None,
        full_names: bool = False,
    ) -> None:
        self.catalogue = catalogue
        self.sources = sources
        self.sample = sample
        self.conditions = conditions
        self.seed = seed
        self.reader = ShardReader(sources)
        self._shard_names = catalogue.names() if full_names else None

    def __getitem__(self, plan: Plan) -> Batch:
        """Decodes the records of a plan; the damaged leave the batch and are named in it.

        A fatal error is named in ``failed``, since one raised in a worker would reach the user
        wrapped in that worker's traceback.
        """
        try:
            if plan.upcoming:
                self.sources.prefetch(self.catalogue.shards[shard] for shard in plan.upcoming)
            return self._batch(plan)
        except FewstepError as error:
            return {"sample": torch.empty(0), "cond": {}, "key": [], "failed": str(error)}

    def _batch(self, plan: Plan) -> Batch:
        numbers = [(int(shard), int(number)) for shard, number in plan.records]
        field = self.sample.for_batch(self._shapes(numbers))
        items = [
            self.decode(field, shard, number, int(epoch))
            for (shard, number), epoch in zip(numbers, plan.epochs, strict=True)
        ]
        skipped = [item for item in items if isinstance(item, Skipped)]
        good = [item for item in items if isinstance(item, Sample)]
        if not good:
            good = [self._stand_in(field, *numbers[0], int(plan.epochs[0]), skipped[0])]
        return self._collate(good, skipped)

    def conditions_of(self, records: Sequence[tuple[int, int]]) -> Conditions:
        """The conditions alone of records (shard, number in the shard); damaged ones are replaced.

        Raises:
            FewstepError: if a shard has no good record.
        """
        found = [self.decode(None, shard, number) for shard, number in records]
        good = [
            self._stand_in(None, shard, number, 0, item) if isinstance(item, Skipped) else item
            for item, (shard, number) in zip(found, records, strict=True)
        ]
        return self._conditions(good)

    def decode(
        self, field: Field | None, shard: int, number: int, epoch: int = 0
    ) -> Sample | Skipped:
        """Decodes one record; what is wrong with it comes back as a :class:`Skipped`.

        Args:
            field: decodes the sample; without one it is left unread.
            shard, number: which record.
            epoch: which its augmentation is drawn for.
        """
        record = self.catalogue.index(shard).record(number, self.catalogue.shards[shard])
        random: Random | None = None
        if self.seed is not None:
            random = partial(numpy_generator, self.seed, "augment", epoch, shard, number)
        notes: list[str] = []

        def part(using: Field) -> Decoded:
            extension = using.extension(record.parts)
            found = using.decode(self.reader.read(record, extension), extension, random)
            if found.note:
                notes.append(f"{record.name}: {found.note}")
            return found

        try:
            conditions = {name: part(using).value for name, using in self.conditions.items()}
            sample = Decoded(None) if field is None else part(field)
            return Sample(sample.value, conditions, self._key(shard, record), notes, sample.cond)
        except FewstepError:
            raise  # about the machine or the shard, not about this record
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            return Skipped(record.name, reason)

    def _key(self, shard: int, record: Record) -> str:
        return f"{self._shard_names[shard]}/{record.key}" if self._shard_names else record.key

    def _shapes(self, numbers: list[tuple[int, int]]) -> list[Shape] | None:
        found: list[Shape] = []
        for shard, number in numbers:
            shapes = self.catalogue.index(shard).shapes
            if shapes is None:
                return None
            found.append((int(shapes[number, 0]), int(shapes[number, 1])))
        return found

    def _stand_in(
        self, field: Field | None, shard: int, number: int, epoch: int, first: Skipped
    ) -> Sample:
        """The next good record of the shard, for a batch that would otherwise be empty.

        Every rank has to take its step; this choice depends on the data alone.
        """
        size = self.catalogue.sizes[shard]
        for step in range(1, size):
            item = self.decode(field, shard, (number + step) % size, epoch)
            if isinstance(item, Sample):
                return item
        raise FewstepError(
            f"No record of the shard '{self.catalogue.shards[shard]}' can be decoded (first: "
            f"{first}). Run: fewstep shards check {self.catalogue.shards[shard]}"
        )

    def _collate(self, good: list[Sample], skipped: list[Skipped]) -> Batch:
        conditions = self._conditions(good)
        batch: Batch = {
            "sample": self.sample.collate([item.value for item in good]),
            "cond": {**_stacked([item.told for item in good]), **conditions.cond},
            "key": [item.key for item in good],
        }
        if conditions.prompt is not None:
            batch["prompt"] = conditions.prompt
        if skipped:
            batch["skipped"] = [str(item) for item in skipped]
        notes = [note for item in good for note in item.notes]
        if notes:
            batch["notes"] = notes
        return batch

    def _conditions(self, good: list[Sample]) -> Conditions:
        cond: dict[str, Any] = {}
        prompt: list[str] | None = None
        for name, field in self.conditions.items():
            values = field.collate([item.conditions[name] for item in good])
            if name == PROMPT:
                prompt = values
            else:
                cond.update(values if isinstance(values, dict) else {name: values})
        return Conditions(cond, prompt)


def _stacked(told: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The records' tensors of each name as one, ``(B, ...)``."""
    return {name: torch.stack([one[name] for one in told]) for name in told[0]}
