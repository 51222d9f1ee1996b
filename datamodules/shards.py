"""Records of local WebDataset shards: an index of where they lie, and reading them at random.

A shard is a plain, uncompressed tar; a record is the run of members that share a name up to the
first dot. The index reads headers only; records are read by offset, so any order costs the same.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand

from fewstep.errors import FewstepError

MAX_MEMBER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Record:
    """One sample's place: its shard, its key and, by extension, (offset, size) of each part."""

    shard: str
    key: str
    parts: dict[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """How messages name this record."""
        return f"{Path(self.shard).name}/{self.key}"


@dataclass
class ShardIndex:
    """All records of a set of shards, in the shards' order.

    Attributes:
        records: every record.
        sizes: number of records of each shard.
    """

    records: list[Record] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, shards: Sequence[str]) -> ShardIndex:
        """Reads the headers of all shards."""
        index = cls()
        for shard in shards:
            found = list(_records_of(shard))
            index.records += found
            index.sizes.append(len(found))
        if not index.records:
            raise FewstepError(f"The {len(shards)} shards hold no records (first: {shards[0]}).")
        return index


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """Expands braces and globs to a sorted list of local files.

    Raises:
        FewstepError: for a ``pipe:`` address, or a pattern that matches nothing.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found: list[str] = []
    for pattern in listed:
        if pattern.startswith("pipe:"):
            raise FewstepError(f"'{pattern}' would run a shell command; give files instead.")
        # glob.glob, not Path.glob: patterns may be absolute.
        expanded = braceexpand.braceexpand(pattern)
        matched = [p for one in expanded for p in sorted(glob.glob(one))]  # noqa: PTH207
        if not matched:
            folder = Path(pattern).parent
            state = "exists but holds none" if folder.is_dir() else "does not exist"
            raise FewstepError(
                f"No shards match '{pattern}': the folder '{folder}' {state}. "
                "Set data.init_args.shards (and val_shards) to your .tar files."
            )
        found += matched
    return found


def _records_of(shard: str) -> Iterator[Record]:
    key, parts = "", dict[str, tuple[int, int]]()
    for member, extension, stem in _members(shard):
        if stem != key and parts:
            yield Record(shard, key, parts)
            parts = {}
        key = stem
        parts[extension] = (member.offset_data, member.size)
    if parts:
        yield Record(shard, key, parts)


def _members(shard: str) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    try:
        # "r:" refuses compressed tars, which would inflate without bound.
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                # Links, devices and sparse members are never data; sizes are bounded.
                if not member.isreg() or member.issparse() or member.size > MAX_MEMBER_BYTES:
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not dot or not stem:
                    continue
                yield member, extension.lower(), f"{folder}/{stem}" if folder else stem
    except (tarfile.TarError, OSError) as error:
        raise FewstepError(
            f"Cannot read the shard '{shard}': {error}. Remove or rebuild it; a shard must be a "
            "plain, uncompressed tar."
        ) from error


class ShardReader:
    """Reads parts of records by offset; opens each shard once a process."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self, record: Record, extension: str) -> bytes:
        """The bytes of one part."""
        offset, size = record.parts[extension]
        if record.shard not in self._files:
            self._files[record.shard] = os.open(record.shard, os.O_RDONLY)
        return os.pread(self._files[record.shard], size, offset)

    def __getstate__(self) -> dict[str, object]:
        return {"_files": {}}  # descriptors do not travel to workers
