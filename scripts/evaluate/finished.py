"""Finished images or videos, in a folder or in shards, as a set of samples to be measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules import Shards
from datamodules.contents import name_of_files
from datamodules.fields import Caption, Field, Images, Videos, image_shape
from datamodules.several import Several
from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from scripts.evaluate.standing import StandIn


class FinishedSamples(StandIn):
    """Samples that somebody has made, decoded as the experiment's own data are.

    Args:
        path: a folder of image or video files (searched to any depth; ``x.txt`` beside ``x.png`` is
            its prompt), one of shards, or a shard.
        data: the experiment's data; their field decodes the files, so that both sides are resized
            and cropped alike.
        num_steps: steps the samples were made in, for the record; 0 is unknown.
        guidance: guidance scale they were made with, for the record.
        most: how many to measure, the first in order; all by default.

    Raises:
        FewstepError: if there are no samples, or the data hold no pixels.
    """

    def __init__(
        self,
        path: Path,
        data: pl.LightningDataModule | None,
        num_steps: int = 0,
        guidance: float = 1.0,
        most: int | None = None,
    ) -> None:
        super().__init__("samples", [num_steps], guidance)
        own = data.reference if isinstance(data, Several) else data
        if not isinstance(own, Shards) or not isinstance(own.sample, Images | Videos):
            raise FewstepError(
                "Finished samples are decoded as the experiment's data are, but this experiment's "
                f"data ({type(own).__name__}) hold no images or videos. Give an experiment, or "
                "`--data`, whose `sample` is datamodules.fields.Images or Videos."
            )
        if not path.exists():
            raise FewstepError(f"There is no folder or shard '{path}' of samples.")
        self._shards: Shards | None = None
        self._files: _Files | None = None
        self._path = path
        if path.is_file() or any(path.rglob("*.tar")):
            self._shards = _as_shards(path, own, most)
            self.num_finished = sum(self._shards.train_catalogue.sizes)
        else:
            self._files = _Files(path, own.sample, most)
            self.num_finished = len(self._files)
        self._batch_size, self._num_workers = own.batch_size, own.num_workers
        first = next(iter(self.finished_batches()))["sample"]
        self.sample_shape = tuple(first.shape[1:])

    def note(self, asked: int) -> str | None:
        """How these samples differ from what the experiment measures, where they do.

        Args:
            asked: how many it measures.
        """
        found = []
        if self.num_finished != asked:
            kind = "file" if self._files is not None else "sample"
            plural = "s" * (self.num_finished != 1)
            found.append(f"{self.num_finished} {kind}{plural} (the experiment measures {asked})")
        made = self._files.first_shape() if self._files is not None else None
        if made is not None and made != self.sample_shape[-2:]:
            (height, width), (high, wide) = made, self.sample_shape[-2:]
            found.append(f"resized from {width} x {height} to {wide} x {high}")
        text = ", ".join(found)
        return f"{text[0].upper()}{text[1:]}." if text else None

    def finished_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """A rank's share of the samples."""
        if self._shards is not None:
            yield from self._shards.reference_batches(rank, world_size)
            return
        assert self._files is not None
        own = torch.utils.data.Subset(self._files, range(rank, self.num_finished, world_size))
        yield from DataLoader(
            own, self._batch_size, num_workers=self._num_workers, collate_fn=self._files.collate
        )

    def sample_source(self) -> dict[str, Any]:
        """Where the samples are, how many files there are, and a name for what these hold."""
        if self._shards is not None:
            whole = self._shards.val_catalogue
            files, contents = len(whole.shards), whole.digest()
        else:
            assert self._files is not None
            found = self._files.found
            files, contents = len(found), name_of_files(self._path, found)
        return {"samples": str(self._path.resolve()), "files": files, "contents": contents}


def _as_shards(path: Path, data: Shards, most: int | None) -> Shards:
    """The shards, found and indexed as the experiment's own are.

    Each rank does so by itself, before there are others to wait for; indexes take their places
    whole, so that it does not matter who makes them.
    """
    conditions: dict[str, Field] = {
        name: field for name, field in data.conditions.items() if isinstance(field, Caption)
    }
    shards = [str(path)] if path.is_file() else sorted(map(str, path.rglob("*.tar")))
    found = Shards(
        shards,
        shards,
        batch_size=data.batch_size,
        sample=data.sample,
        conditions=conditions,
        num_workers=data.num_workers,
        max_damaged=0,
        max_member_bytes=data.max_member_bytes,
    )
    found.sources = data.sources  # with its cache and options
    found.prepare_data()
    found.setup()
    if most is not None:
        found.train_catalogue = found.train_catalogue.first(most)  # the other remains whole
    return found


class _Files(Dataset[Batch]):
    """Files of a folder that a field can decode, in the order of their names.

    Args:
        folder: searched to any depth.
        field: decodes them.
        most: how many to use, of all that were found; None: every one.
    """

    def __init__(self, folder: Path, field: Field, most: int | None) -> None:
        self.folder = folder
        self.field = field
        extensions = {f".{key}" for key in field.keys}
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in extensions)
        if not found:
            raise FewstepError(
                f"'{folder}' holds no {', '.join(sorted(field.keys))} files and no shards."
            )
        self.found, self.files = found, found[:most]

    def __len__(self) -> int:
        return len(self.files)

    def first_shape(self) -> tuple[int, int] | None:
        """Height and width of the first file as it is; None for a video."""
        data = self.files[0].read_bytes()
        return image_shape(self.files[0].suffix[1:].lower(), lambda limit: data[:limit])

    def __getitem__(self, number: int) -> Any:
        path = self.files[number]
        try:
            value = self.field.decode(path.read_bytes(), path.suffix[1:].lower(), None).value
        except (ValueError, OSError) as error:
            return FewstepError(
                f"'{path}' cannot be decoded ({error}). Mend it or take it out: a set that lacks "
                "samples is another set."
            )
        text = path.with_suffix(".txt")
        prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else None
        return value, str(path.relative_to(self.folder)), prompt

    def collate(self, items: list[Any]) -> Batch:
        """A batch of decoded files.

        Raises:
            FewstepError: for a damaged file, or files of several sizes.
        """
        for item in items:
            if isinstance(item, FewstepError):
                raise item
        values, keys, prompts = zip(*items, strict=True)
        sizes = {tuple(value.shape) for value in values}
        if len(sizes) > 1:
            raise FewstepError(
                f"The samples in '{self.folder}' have several sizes, {sorted(sizes)[:3]}; give the "
                "data's `sample` a size, to which all are then brought."
            )
        sample = self.field.finish(self.field.collate(list(values)))
        batch: Batch = {"sample": sample, "cond": {}, "key": list(keys)}
        if all(prompt is not None for prompt in prompts):
            batch["prompt"] = list(prompts)
        return batch
