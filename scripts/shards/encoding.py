"""Turns shards of pixels and captions into shards of latents and embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.catalogue import Catalogue
from datamodules.fields import Caption, Field
from datamodules.records import ShardReader, Skipped
from datamodules.sources import Sources
from fewstep.errors import FewstepError
from fewstep.seeding import numpy_generator
from scripts.shards.parallel import fork_server
from scripts.shards.pipelines import Conditions, Encoder, LatentKind
from scripts.shards.tars import all_or_nothing, write_shard

COPIED = ("cls", "txt", "json")
LATENT, TEXT = "latent.safetensors", "text.safetensors"


@dataclass(frozen=True)
class Recipe:
    """How records are encoded.

    Attributes:
        pixels: decodes the image or the clip.
        caption: decodes the caption; None: text is not encoded.
        latents: what to store of the VAE's distribution.
        dtype: of what is stored.
        seed: of the noise of sampled latents.
        batch_size: records encoded at a time.
    """

    pixels: Field
    caption: Caption | None
    latents: LatentKind
    dtype: torch.dtype
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Source:
    """One decoded record: key, pixels ``(C, ...)`` uint8, caption, and parts to copy."""

    key: str
    pixels: Tensor
    caption: str | None
    copied: dict[str, bytes]


@dataclass(frozen=True)
class Loaded:
    """Some records of a shard, decoded; or why that is impossible."""

    shard: int
    records: list[Source] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failure: str | None = None


class Loading(Dataset[Loaded]):
    """Decodes batches of records; what the loading processes run.

    Batches end where shards do, so that a shard's contents depend on nothing but itself.
    """

    def __init__(self, catalogue: Catalogue, sources: Sources, recipe: Recipe) -> None:
        self.catalogue, self.recipe = catalogue, recipe
        self.reader = ShardReader(sources)
        self.batches = [
            (shard, range(start, min(start + recipe.batch_size, size)))
            for shard, size in enumerate(catalogue.sizes)
            for start in range(0, size, recipe.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Loaded:
        shard, records = self.batches[number]
        try:
            found = [self._record(shard, record) for record in records]
        except FewstepError as error:  # raised here it would reach the user inside a traceback
            return Loaded(shard, failure=str(error))
        good = [item for item in found if isinstance(item, Source)]
        return Loaded(shard, good, [item for item in found if isinstance(item, Skipped)])

    def _record(self, shard: int, number: int) -> Source | Skipped:
        record = self.catalogue.index(shard).record(number, self.catalogue.shards[shard])

        def part(using: Field) -> Any:
            extension = using.extension(record.parts)
            return using.decode(self.reader.read(record, extension), extension, None).value

        try:
            caption = None if self.recipe.caption is None else part(self.recipe.caption)
            pixels = part(self.recipe.pixels)
        except FewstepError:
            raise  # about the machine or the shard, not about this record
        except Exception as error:
            reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
            return Skipped(record.name, reason)
        copied = {name: self.reader.read(record, name) for name in COPIED if name in record.parts}
        return Source(record.key, pixels, caption, copied)


def encode_shards(
    encoder: Encoder,
    recipe: Recipe,
    loading: Loading,
    dest: Path,
    workers: int,
    max_damaged: int,
    progress: tqdm[Any],
) -> list[Skipped]:
    """Writes one shard for each of the loader's, under its name.

    Args:
        encoder: the models.
        recipe: how to encode.
        loading: decodes the records.
        dest: folder of the new shards.
        workers: processes that decode meanwhile.
        max_damaged: damaged records after which to give up.
        progress: counts records.

    Returns:
        The damaged records that were left out.

    Raises:
        FewstepError: for too many damaged records, or a shard without a sound one.
    """
    skipped: list[Skipped] = []

    def sound(batches: Iterator[Loaded]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for loaded in batches:
            if loaded.failure:
                raise FewstepError(loaded.failure)
            skipped.extend(loaded.skipped)
            _limit(skipped, max_damaged)
            if loaded.records:
                yield from encode_batch(encoder, recipe, loaded.records)
            progress.update(len(loaded.records) + len(loaded.skipped))

    loader: DataLoader[Any] = DataLoader(
        loading,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=fork_server() if workers else None,
    )
    batches = iter(loader)
    per_shard = [-(-size // recipe.batch_size) for size in loading.catalogue.sizes]
    for address, count in zip(loading.catalogue.shards, per_shard, strict=True):
        write_shard(dest / shard_name(address), sound(_take(batches, count)))
    return skipped


def _take(batches: Iterator[Loaded], count: int) -> Iterator[Loaded]:
    for _ in range(count):
        try:
            yield next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise FewstepError(
                "A loading process was killed, most likely for want of memory. Use fewer --workers "
                "or a smaller --batch-size; whole shards are kept, and the same command goes on."
            ) from error


def encode_batch(
    encoder: Encoder, recipe: Recipe, records: Sequence[Source]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and parts of a batch's encoded records."""
    pixels = recipe.pixels.finish(torch.stack([record.pixels for record in records]))

    def noises(like: Tensor) -> Tensor:
        drawn = [noise(recipe.seed, record.key, like.shape[1:]) for record in records]
        return torch.stack(drawn).to(like.device)

    with torch.inference_mode():
        latents = encoder.latents(pixels, recipe.latents, noises)
        text: Conditions = {}
        if recipe.caption is not None:
            text = encoder.text([record.caption or "" for record in records])
    for number, record in enumerate(records):
        parts = {**record.copied, LATENT: packed(latents, number, recipe.dtype, record.key)}
        if text:
            parts[TEXT] = packed(text, number, recipe.dtype, record.key)
        yield record.key, parts


def noise(seed: int, key: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, a pure function of the seed and a record's key."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    drawn = numpy_generator(seed, "latent", number).standard_normal(tuple(shape), dtype="float32")
    return torch.from_numpy(drawn)


def packed(values: Conditions, number: int, dtype: torch.dtype, key: str) -> bytes:
    """One record's tensors as a safetensors file.

    Raises:
        FewstepError: if a value is beyond the type's range.
    """
    own = {name: value[number].to("cpu", dtype).contiguous() for name, value in values.items()}
    for name, value in own.items():
        if not value.isfinite().all():
            raise FewstepError(
                f"The {name} of '{key}' is not finite as {dtype}; store it with --dtype bf16 or "
                "fp32, and compute with --compute-dtype fp32."
            )
    return bytes(save(own))


def write_empty(encoder: Encoder, dest: Path, dtype: torch.dtype) -> None:
    """Writes what stands for "no prompt", which training puts in place of some captions."""
    with torch.inference_mode():
        values = encoder.empty()
    with all_or_nothing(dest / "empty.safetensors") as file:
        file.write_bytes(packed(values, 0, dtype, "the empty prompt"))


def shard_name(address: str) -> str:
    """The last part of a shard's address."""
    return address.partition("?")[0].rpartition("/")[2]


def _limit(skipped: Sequence[Skipped], most: int) -> None:
    if len(skipped) > most:
        raise FewstepError(
            f"{len(skipped):,} damaged records are more than --max-damaged {most:,} (last: "
            f"{skipped[-1]}). Check the shards with `fewstep shards check`, or raise the limit; "
            "if the records have no captions at all, add --no-text."
        )
