"""All records of a set of shards: their counts now, their places when they are read."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from datamodules.index import (
    MAX_MEMBER_BYTES,
    SUFFIX,
    Measure,
    ShardIndex,
    Summary,
    scan,
    summary,
)
from datamodules.sources import Sources

READ_AT_ONCE = 16
COARSE = 2.0  # seconds: how exactly the coarsest file systems keep a file's time
PARALLEL_FROM = 200  # shards: below, starting processes takes longer than they save


@dataclass
class Catalogue:
    """The indexes of shards, by the shards' numbers.

    Attributes:
        shards: addresses.
        files: the index of each, on this machine.
        sizes: number of records of each.
        contents: a name for the contents of each, with its number of bytes.
        kept: how many indexes stay in memory.
    """

    shards: list[str]
    files: list[Path]
    sizes: list[int]
    contents: list[str]
    kept: int = 64
    _open: OrderedDict[int, ShardIndex] = field(default_factory=OrderedDict, repr=False)

    def index(self, shard: int) -> ShardIndex:
        """The index of one shard."""
        if shard not in self._open:
            self._open[shard] = ShardIndex.load(self.files[shard])
            if len(self._open) > self.kept:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def at(self, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The records at places ``(N,)`` in the whole: ``(N, 2)`` of shard and number in it."""
        ends = np.cumsum(self.sizes)
        shards = np.searchsorted(ends, places, side="right")
        return np.stack([shards, np.asarray(places) - (ends - self.sizes)[shards]], axis=-1)

    def digest(self) -> str:
        """A name for this set of records.

        It covers, in order, each shard's name without its folder, its number of records and of
        bytes, and its contents: names, sizes and samples of the bytes of all parts, as
        :mod:`datamodules.contents` says. Of remote shards with side-car indexes that older versions
        made, it covers names and sizes only.
        """
        lines = [
            f"{name} {size} {contents}"
            for name, size, contents in zip(self._bases(), self.sizes, self.contents, strict=True)
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def names(self) -> list[str]:
        """What to call each shard: its name without its folder, and its number if others share it.

        The same wherever the data set lies.
        """
        bases = self._bases()
        times = Counter(bases)
        return [
            base if times[base] == 1 else f"{number}:{base}" for number, base in enumerate(bases)
        ]

    def first(self, count: int) -> Catalogue:
        """The first so many records, in order; all where they are fewer."""
        ends = list(accumulate(self.sizes))
        kept = bisect_left(ends, count) + 1  # shards
        sizes = self.sizes[:kept]
        sizes[-1] -= max(0, sum(sizes) - count)
        return replace(
            self,
            shards=self.shards[:kept],
            files=self.files[:kept],
            sizes=sizes,
            contents=self.contents[:kept],
            _open=OrderedDict(),
        )

    def _bases(self) -> list[str]:
        return [shard.rsplit("/", 1)[-1] for shard in self.shards]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # workers read what they need themselves


def catalogue(
    sources: Sources,
    shards: Sequence[str],
    measure: Measure | None = None,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> Catalogue:
    """Finds the index of every shard, and makes those that are missing or outdated.

    An index lies beside its shard, or, made here, in the cache: other people's folders are not
    written to.

    Args:
        sources: where shards come from.
        shards: addresses.
        measure: see :func:`~datamodules.index.scan`; with it, an index without shapes is made anew.
        max_member_bytes: larger members are refused.

    Raises:
        FewstepError: for a shard that cannot be read.
    """
    look = partial(_find, sources, shapes=measure is not None)
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        found = list(pool.map(look, shards))
    missing = [shard for shard, entry in zip(shards, found, strict=True) if entry is None]
    if missing:
        _make(sources, missing, measure, max_member_bytes)
        found = [entry or look(shard) for shard, entry in zip(shards, found, strict=True)]
    entries = [entry for entry in found if entry is not None]
    assert len(entries) == len(shards)
    sizes = [about.records for _, about in entries]
    contents = [f"{about.tar_bytes} {about.contents}" for _, about in entries]
    return Catalogue(list(shards), [path for path, _ in entries], sizes, contents)


def _find(sources: Sources, shard: str, shapes: bool) -> tuple[Path, Summary] | None:
    """The current index of a shard, if there is one.

    One of ours about a local shard has the shard's time of change, and is outdated with it.
    """
    local = sources.is_local(shard)
    ours = partial(sources.own, shard, SUFFIX)
    beside = partial(sources.companion, shard, SUFFIX)
    # Looking beside a remote shard costs a request; ours, if there, was made for want of that one.
    for look in (beside, ours) if local else (ours, beside):
        path = look()
        if path is None or not path.exists():
            continue
        about = summary(path)
        current = not local or about.speaks_of(sources.local(shard))
        if local and look is ours:
            current = current and abs(_time(path) - _time(sources.local(shard))) < COARSE
        if not current or (shapes and not about.has_shapes):
            continue
        if about.contents:
            return path, about
        if not local:  # rather than fetch the shard for the sake of a name
            ShardIndex.load(path).with_contents().save(ours())
            return ours(), summary(ours())
    return None


def _make(
    sources: Sources, shards: Sequence[str], measure: Measure | None, max_member_bytes: int
) -> None:
    job = partial(_make_one, sources, measure, max_member_bytes)
    bar = partial(tqdm, total=len(shards), desc="Indexing shards", unit="shard", delay=2)
    if len(shards) < PARALLEL_FROM:
        for _ in bar(map(job, shards)):
            pass
        return
    # Spawned: a fork would inherit the threads and connections of whoever looked for the indexes.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for _ in bar(pool.map(job, shards, chunksize=4)):
            pass


def _make_one(sources: Sources, measure: Measure | None, max_member_bytes: int, shard: str) -> None:
    path = sources.local(shard)
    time = _time(path)
    scan(path, max_member_bytes, measure).save(sources.own(shard, SUFFIX), time)


def _time(path: Path) -> float:
    return path.stat().st_mtime
