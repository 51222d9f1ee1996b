"""Videos with pictures beside them, for methods that learn motion from one set, looks from another.

Zhai et al., "Motion Consistency Model" (NeurIPS 2024): a batch of video clips comes with a batch of
better images, as many as frames of a clip are judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from datamodules.catalogue import Catalogue
from datamodules.several import Several
from datamodules.stream import Plan, Stream
from datamodules.streaming import Shards
from fewstep.batches import rows_of
from fewstep.contracts import Batch
from fewstep.errors import FewstepError


class _SideBySide:
    """The batches of two loaders, the pictures within the videos' batches."""

    def __init__(self, videos: DataLoader[Any], images: DataLoader[Any]) -> None:
        self.videos, self.images = videos, images

    def __len__(self) -> int:
        return len(self.videos)

    def __iter__(self) -> Iterator[Batch]:
        for batch, pictures in zip(self.videos, self.images, strict=True):
            batch["images"] = pictures
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the datamodule keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing."""


class _InCircles:
    """For every batch of held-out videos the next held-out pictures, the first after the last.

    All ranks together take each picture in turn.

    Args:
        videos: the batches of this rank's videos.
        catalogue: of the pictures.
        each: pictures a video.
    """

    def __init__(self, videos: Stream, catalogue: Catalogue, each: int) -> None:
        self.videos, self.catalogue, self.each = videos, catalogue, each

    def __len__(self) -> int:
        return len(self.videos)

    def __iter__(self) -> Iterator[Plan]:
        rank, world, total = self.videos.rank, self.videos.world_size, sum(self.catalogue.sizes)
        place = 0
        for plan in self.videos:
            count = self.each * len(plan.records)
            wanted = (rank + world * np.arange(place, place + count)) % total
            yield Plan(np.zeros(count, np.int64), self.catalogue.at(wanted), [])
            place += count


class VideosWithImages(Several):
    """Batches of videos that hold a batch of pictures each, in ``images``.

    An update takes one batch of either set; each keeps its own exact order and position, so that
    none of its records is repeated or left out within its epoch. Pictures may have another
    resolution. Rows ``r i`` to ``r i + r - 1`` of the pictures go with video ``i``; their keys and
    conditions are their own.

    Where damaged videos are missing from a batch, its last pictures are missing too; where damaged
    pictures are, the batch's first ones stand in for them. So there are always ``r`` a video.

    Args:
        videos: the batch's samples.
        images: the pictures. Their batch size is that of the videos times ``r``, a whole number.
        reference: the set that metrics compare with and that lends conditions.

    Raises:
        FewstepError: if a stream ends, or the batch sizes do not go with one another.
    """

    def __init__(
        self,
        videos: Shards,
        images: Shards,
        reference: Literal["videos", "images"] = "videos",
    ) -> None:
        super().__init__({"videos": videos, "images": images}, reference)
        self.per_video, rest = divmod(images.batch_size, videos.batch_size)
        if rest or not self.per_video:
            raise FewstepError(
                f"data.init_args.images has batch_size: {images.batch_size}, which is no multiple "
                f"of the videos' {videos.batch_size}: every video takes equally many pictures. "
                f"Set it to {videos.batch_size * max(1, self.per_video)}, for "
                f"{max(1, self.per_video)} a video."
            )
        self.videos, self.images = videos, images

    @property
    def batch_size(self) -> int:
        """Videos a batch of one device has."""
        return self.videos.batch_size

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> Iterable[Batch]:
        """Training batches of both, from their positions on."""
        return _SideBySide(self.videos.train_dataloader(), self.images.train_dataloader())

    def val_dataloader(self) -> Iterable[Batch]:
        """Every held-out video, in equally many batches on all ranks, with held-out pictures.

        Which ones is the same at every validation. Where they are fewer than the videos take, they
        come again and again; where they are more, the rest does not come.
        """
        pictures = _InCircles(self.videos.val_stream(), self.images.val_catalogue, self.per_video)
        return _SideBySide(self.videos.val_dataloader(), self.images.val_dataloader(pictures))

    # ------------------------------------------------------------------ batches

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Has each set note its damaged records, and keeps ``r`` pictures a video."""
        pictures = self.images.on_before_batch_transfer(batch.pop("images"), dataloader_idx)
        batch = self.videos.on_before_batch_transfer(batch, dataloader_idx)
        wanted, there = self.per_video * len(batch["sample"]), len(pictures["sample"])
        if wanted != there:
            pictures = rows_of(pictures, [number % there for number in range(wanted)])
        batch["images"] = pictures
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finishes both on the device."""
        pictures = self.images.on_after_batch_transfer(batch["images"], dataloader_idx)
        batch = self.videos.on_after_batch_transfer(batch, dataloader_idx)
        batch["images"] = pictures
        return batch
