"""Labelled images from WebDataset shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from datamodules.decoding import ImageDecoder, Sample, Skipped
from datamodules.order import EndlessBatches, FiniteBatches
from datamodules.shards import Record, ShardIndex, expand_shards
from fewstep.contracts import Batch
from fewstep.errors import FewstepError


class RecordDataset(Dataset[Sample | Skipped]):
    """Records by number, decoded."""

    def __init__(self, records: list[Record], decoder: ImageDecoder) -> None:
        self.records = records
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sample | Skipped:
        return self.decoder(self.records[number])


def collate(items: list[Sample | Skipped]) -> Batch:
    """Stacks decoded samples; damaged ones leave the batch and are named in ``skipped``."""
    good = [item for item in items if isinstance(item, Sample)]
    skipped = [f"{item.name}: {item.reason}" for item in items if isinstance(item, Skipped)]
    if not good:
        raise FewstepError(
            f"Every record of a batch is damaged (first: {skipped[0]}). Check the shards."
        )
    pixels = torch.stack([sample.pixels for sample in good])
    cond = {}
    if good[0].label is not None:
        cond["class_labels"] = torch.tensor([cast(int, sample.label) for sample in good])
    batch: Batch = {
        "sample": pixels.float() / 127.5 - 1,
        "cond": cond,
        "key": [sample.key for sample in good],
    }
    if skipped:
        batch["skipped"] = skipped
    return batch


class ImageShards(pl.LightningDataModule):
    """Streams labelled images; the order is a pure function of (seed, position).

    The position is counted in records the optimiser has consumed, saved with every checkpoint and
    restored exactly, whatever loaders have prefetched.

    Args:
        shards: training shards: files, globs or braces, one or a list.
        val_shards: held-out shards, likewise.
        batch_size: records a device and update.
        channels: 1 (grey) or 3 (RGB).
        image_size: side of the square samples; larger images are resized and centre-cropped.
        label_key: extension of the class label; null for unlabelled data.
        num_workers: decoding processes a device; 0 decodes in the training process.
        max_damaged: damaged records tolerated in a run before it stops.
        seed: of the order; the run's seed does not change it.
    """

    def __init__(
        self,
        shards: str | list[str],
        val_shards: str | list[str],
        batch_size: int,
        channels: int = 3,
        image_size: int | None = None,
        label_key: str | None = "cls",
        num_workers: int = 0,
        max_damaged: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shards = shards
        self.val_shards = val_shards
        self.batch_size = batch_size
        self.decoder = ImageDecoder(channels, image_size, label_key)
        self.num_workers = num_workers
        self.max_damaged = max_damaged
        self.seed = seed
        self.damaged: set[str] = set()
        self._consumed = 0
        self._consumed_at_update = 0

    def setup(self, stage: str | None = None) -> None:
        """Indexes the shards."""
        if not hasattr(self, "train_index"):
            self.train_index = ShardIndex.of(expand_shards(self.shards))
            self.val_index = ShardIndex.of(expand_shards(self.val_shards))

    # ------------------------------------------------------------------ position

    @property
    def consumed(self) -> int:
        """Records all ranks together have trained on."""
        assert self.trainer is not None
        updates = self.trainer.global_step - self._consumed_at_update
        return self._consumed + updates * self.batch_size * self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, the same on every rank."""
        assert self.trainer is not None
        return {
            "consumed": self.consumed,
            "at_update": self.trainer.global_step,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position; the order it belongs to must be the same."""
        if state_dict["seed"] != self.seed:
            raise FewstepError(
                f"The checkpoint's stream has seed {state_dict['seed']}, this run's "
                f"{self.seed}; set data.init_args.seed: {state_dict['seed']} to resume."
            )
        # Lightning restores the datamodule before its counters: global_step is still 0 here.
        self._consumed = state_dict["consumed"]
        self._consumed_at_update = state_dict["at_update"]

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless batches from the current position."""
        assert self.trainer is not None
        batches = EndlessBatches(
            self.train_index.sizes,
            self.batch_size,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.consumed,
        )
        return self._loader(self.train_index.records, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every held-out record once."""
        assert self.trainer is not None
        batches = FiniteBatches(
            len(self.val_index.records),
            self.batch_size,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return self._loader(self.val_index.records, batches)

    def reference_batches(self) -> Iterable[Batch]:
        """The training records once, in order: what Frechet distances compare with."""
        self.setup()
        batches = FiniteBatches(len(self.train_index.records), self.batch_size)
        return map(self._note_damage, self._loader(self.train_index.records, batches))

    def reference_protocol(self) -> dict[str, Any]:
        """Which records the reference holds."""
        self.setup()
        names = "\n".join(record.name for record in self.train_index.records)
        return {
            "data": type(self).__name__,
            "split": "train",
            "records": len(self.train_index.records),
            "records_sha256": hashlib.sha256(names.encode()).hexdigest()[:16],
            "image_size": self.decoder.size,
        }

    def _loader(self, records: list[Record], batches: Iterable[list[int]]) -> DataLoader[Any]:
        make = partial(DataLoader, RecordDataset(records, self.decoder), collate_fn=collate)
        return make(
            batch_sampler=batches,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    # ------------------------------------------------------------------ damage

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Takes note of damaged records before the batch goes to the device."""
        return self._note_damage(batch)

    def _note_damage(self, batch: Batch) -> Batch:
        for message in batch.pop("skipped", []):
            if message not in self.damaged:
                self.damaged.add(message)
                rank_zero_warn(f"Skipped a damaged record: {message}")
        if len(self.damaged) > self.max_damaged:
            raise FewstepError(
                f"{len(self.damaged)} damaged records are more than max_damaged: "
                f"{self.max_damaged}. Check the shards, or raise the limit."
            )
        return batch
