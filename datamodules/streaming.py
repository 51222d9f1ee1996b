"""Any WebDataset shards as a Lightning datamodule: exact order, exact resume, nothing unpickled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from datamodules.catalogue import Catalogue, catalogue
from datamodules.damage import Damage
from datamodules.fields import Field, Images, image_shape
from datamodules.index import MAX_MEMBER_BYTES
from datamodules.records import Records
from datamodules.sources import Sources
from datamodules.spread import spread
from datamodules.stream import Once, Plan, Position, Remainder, Stream
from datamodules.worker_signals import held_back
from datamodules.workers import Explained, prepare_worker
from fewstep.contracts import Batch, Conditions
from fewstep.errors import FewstepError, require_at_least


class Loader(DataLoader[Any]):
    """A DataLoader whose position the datamodule keeps, and that explains the death of a worker.

    Lightning warns of loaders without a state; one of theirs would count what was prefetched.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches."""
        with held_back():
            return Explained(super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing."""


class Shards(pl.LightningDataModule):
    """Streams samples and their conditions from WebDataset shards.

    The order is a pure function of (seed, epoch, number of ranks, number of workers). Every record
    appears exactly once an epoch over all ranks, and all ranks get equally many batches. The
    position is counted in records the optimiser has consumed, whatever loaders have prefetched; it
    is saved with every checkpoint, and a run resumed on other ranks, workers or batch sizes goes on
    with the epoch without a gap or a repetition.

    Args:
        shards: training shards: files, folders, globs, braces or addresses (http, https, s3, gs,
            hf), one or a list.
        val_shards: held-out shards, likewise.
        batch_size: records a device and update.
        sample: what a sample is: Images, Videos or Latents, and how they are cut.
        conditions: conditions by the names of the backbone's own arguments, such as
            ``class_labels``; ``prompt`` for captions that are encoded on the fly.
        num_workers: loading processes a device; 0 loads in the training process.
        prefetch_batches: batches each of them prepares ahead.
        remainder: what becomes of an epoch's records that do not fill a batch on every rank.
            ``carry``: the next epoch completes it, and the stream is endless. ``share``: the ranks
            share them in a shorter batch. ``drop``: they are left out this time.
        group_shards: how many shards each worker mixes at a time; as many are open, or cached.
        max_damaged: damaged records one process tolerates before it stops the run.
        max_member_bytes: shards with larger members are refused.
        restart_stream: whether to begin anew, instead of refusing, where a checkpoint's stream was
            over other shards or had another seed.
        cache: folder for copies of remote shards; null: below FEWSTEP_CACHE.
        cache_gib: its bound.
        attempts: how often a transfer is tried.
        storage_options: for fsspec, by protocol: ``{s3: {endpoint_url: ...}}``.
        seed: of the order and of augmentations; the run's seed does not change them.
    """

    def __init__(
        self,
        shards: str | list[str],
        val_shards: str | list[str],
        batch_size: int,
        sample: Field,
        conditions: dict[str, Field] | None = None,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        remainder: Remainder = "carry",
        group_shards: int = 16,
        max_damaged: int = 100,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        restart_stream: bool = False,
        cache: str | None = None,
        cache_gib: float = 100.0,
        attempts: int = 6,
        storage_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size)
        require_at_least(0, num_workers=num_workers)
        self.shards = shards
        self.val_shards = val_shards
        self.batch_size = batch_size
        self.sample = sample
        self.conditions = conditions or {}
        self.num_workers = num_workers
        self.prefetch_batches = prefetch_batches
        self.remainder: Remainder = remainder
        self.group_shards = group_shards
        self.max_member_bytes = max_member_bytes
        self.restart_stream = restart_stream
        self.sources = Sources(cache, cache_gib, attempts, storage_options)
        self.seed = seed
        self.damage = Damage(max_damaged)
        self._position = Position()
        self._batches_before = 0
        self._lending: Records | None = None

    # ------------------------------------------------------------------ set up

    def prepare_data(self) -> None:
        """Makes the indexes that are missing, once on each machine."""
        self._catalogue(self.shards)
        self._catalogue(self.val_shards)

    def setup(self, stage: str | None = None) -> None:
        """Finds out how many records there are."""
        if not hasattr(self, "train_catalogue"):
            self.train_catalogue = self._catalogue(self.shards)
            self.val_catalogue = self._catalogue(self.val_shards)

    def _catalogue(self, patterns: str | list[str]) -> Catalogue:
        measure = image_shape if isinstance(self.sample, Images) and self.sample.sizes else None
        shards = self.sources.expand(patterns)
        found = catalogue(self.sources, shards, measure, self.max_member_bytes)
        found.kept = 2 * self.group_shards + 2
        return found

    # ------------------------------------------------------------------ position

    def batches_consumed(self) -> int:
        """Training batches this rank's optimiser has consumed since the run was first begun."""
        assert self.trainer is not None
        return self.trainer.global_step

    def position(self) -> Position:
        """How far the optimiser has come."""
        return self.stream().after(self._position, self.batches_consumed() - self._batches_before)

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, the same on every rank."""
        return {
            **self.position().state(),
            "batches_before": self.batches_consumed(),
            "seed": self.seed,
            "records": self.train_catalogue.digest(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position.

        Raises:
            FewstepError: if it is one of another stream and ``restart_stream`` is off.
        """
        state = dict(state_dict)
        # Lightning restores the datamodule before its counters: global_step is still 0 here.
        self._batches_before = state.pop("batches_before")
        seed, records = state.pop("seed"), state.pop("records")
        if (seed, records) == (self.seed, self.train_catalogue.digest()):
            self._position = Position.restored(state)
        elif not self.restart_stream:
            if seed != self.seed:
                what, remedy = "another seed", f"Set data.init_args.seed: {seed}"
            else:
                what = "other shards, or other contents of them, or by an older fewstep"
                remedy = "Use the shards it was read from"
            raise FewstepError(
                f"The checkpoint's stream was read with {what}: it cannot be continued. {remedy} "
                "to resume exactly, or set data.init_args.restart_stream: true to begin a new "
                "epoch from here."
            )

    # ------------------------------------------------------------------ loaders

    def stream(self) -> Stream:
        """The training stream of this rank, from its position."""
        assert self.trainer is not None
        return Stream(
            self.train_catalogue.sizes,
            self.batch_size,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.num_workers,
            self.group_shards,
            self.remainder,
            buckets=self._buckets if self._bucketed() else None,
            position=self.position,
            look_ahead=not all(map(self.sources.is_local, self.train_catalogue.shards)),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches from the current position on."""
        return self._loader(self.train_catalogue, self.stream(), self.seed)

    def val_stream(self) -> Stream:
        """Every held-out record, in equally many batches on all ranks, since they work together.

        Each record comes once, unless the last round has too few for all ranks: then the first
        ones come again, to fill it.
        """
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return self._once(self.val_catalogue, rank, world, "repeat")

    def val_dataloader(self, plans: Iterable[Plan] | None = None) -> DataLoader[Any]:
        """The held-out batches of :meth:`val_stream`, or of other plans over the same records."""
        return self._loader(self.val_catalogue, self.val_stream() if plans is None else plans)

    def reference_batches(self, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """The training records once, in order: what Frechet distances compare with.

        Keys name the shard too, since many data sets begin anew with them in every shard. Some
        ranks may get one batch fewer than others, and none where records are fewer than ranks.
        """
        self.setup()
        once = self._once(self.train_catalogue, rank, world_size, "uneven")
        for batch in self._loader(self.train_catalogue, once, full_names=True):
            yield self.on_after_batch_transfer(self.on_before_batch_transfer(batch, 0), 0)

    def reference_conditions(self, numbers: Sequence[int]) -> Conditions:
        """Conditions of training records, evenly spread over the shards."""
        if not self.conditions:
            return Conditions({})
        self.setup()
        places = spread(numbers, sum(self.train_catalogue.sizes))
        if self._lending is None:  # kept, and with it the shards' open files
            self._lending = Records(
                self.train_catalogue, self.sources, self.sample, self.conditions
            )
        return self._lending.conditions_of(self.train_catalogue.at(places).tolist())

    def reference_protocol(self) -> dict[str, Any]:
        """Which records the reference holds."""
        self.setup()
        return {
            "data": type(self).__name__,
            "split": "train",
            "records": sum(self.train_catalogue.sizes),
            "records_sha256": self.train_catalogue.digest(),
            "sample": self.sample.describe(),
        }

    def _once(self, of: Catalogue, rank: int, world_size: int, remainder: Once) -> Stream:
        """All records in a fixed order; the last batches are shorter, evenly so over the ranks."""
        return Stream(
            of.sizes,
            self.batch_size,
            self.seed,
            rank,
            world_size,
            self.num_workers,
            remainder=remainder,
            shuffle=False,
        )

    def _loader(
        self,
        of: Catalogue,
        plans: Iterable[Plan],
        augmentations: int | None = None,
        full_names: bool = False,
    ) -> DataLoader[Any]:
        records = Records(of, self.sources, self.sample, self.conditions, augmentations, full_names)
        return Loader(
            records,
            sampler=plans,
            batch_size=None,  # a plan is a whole batch
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_batches if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=prepare_worker,
        )

    def _bucketed(self) -> bool:
        return self.sample.buckets(self.train_catalogue.index(0)) is not None

    def _buckets(self, shard: int) -> Any:
        return self.sample.buckets(self.train_catalogue.index(shard))

    # ------------------------------------------------------------------ batches

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Raises what a loading process met, and takes note of damaged records."""
        return self.damage.take(batch)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finishes the samples on the device: bytes travel there faster than floats."""
        batch["sample"] = self.sample.finish(batch["sample"])
        return batch
