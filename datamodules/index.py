"""The index of a shard: where each record's parts lie, so that any of them is one read away.

A shard is a plain, uncompressed WebDataset tar; a record is the run of members that share a name up
to the first dot of its last component. ``x.tar`` may have its index beside it as ``x.tar.index``, a
safetensors file that holds numbers and names only.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from datamodules.contents import Contents
from fewstep.errors import FewstepError

SUFFIX = ".index"
FORMAT = "fewstep shard index 1"
ABOUT = "about"
MAX_MEMBER_BYTES = 256 * 2**20
ABSENT = -1
BLOCK = 512  # bytes of a tar header, and what members are padded to
NAME_BYTES = 100  # of a header, at its beginning

Shape = tuple[int, int]
Read = Callable[[int], bytes]
Measure = Callable[[str, Read], Shape | None]


@dataclass(frozen=True)
class Record:
    """One sample's place: its shard's address, its key and, by extension, (offset, size)."""

    shard: str
    key: str
    parts: dict[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """How messages name this record."""
        return f"{self.shard.rsplit('/', 1)[-1]}/{self.key}"


@dataclass(frozen=True)
class ShardIndex:
    """The records of one shard.

    Attributes:
        keys: ``n`` names.
        extensions: ``E`` kinds of parts that occur, such as ``png`` and ``cls``.
        offsets, sizes: ``(n, E)`` bytes; -1 where a record lacks the part.
        tar_bytes: size of the shard, by which an outdated index is noticed.
        shapes: ``(n, 2)`` height and width of each record's image, 0 where unknown; or None.
        contents: name of what the shard holds (see :mod:`datamodules.contents`); empty in indexes
            that older versions made.
    """

    keys: list[str]
    extensions: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    tar_bytes: int
    shapes: npt.NDArray[np.int32] | None = None
    contents: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, number: int, shard: str) -> Record:
        """The place of one record; ``shard`` is the shard's address."""
        parts = {
            extension: (int(self.offsets[number, column]), int(self.sizes[number, column]))
            for column, extension in enumerate(self.extensions)
            if self.offsets[number, column] != ABSENT
        }
        return Record(shard, self.keys[number], parts)

    def _last(self) -> tuple[str, int, int]:
        row, column = np.unravel_index(self.offsets.argmax(), self.offsets.shape)
        name = f"{self.keys[row]}.{self.extensions[column]}"
        return name, int(self.offsets[row, column]), int(self.sizes[row, column])

    def with_contents(self) -> ShardIndex:
        """For an index that lacks it, whose shard is not at hand: the name of names and sizes."""
        contents = Contents()
        for number in range(len(self)):
            for extension, (_, size) in self.record(number, "").parts.items():
                contents.add(f"{self.keys[number]}.{extension}", size)
        return replace(self, contents=contents.name())

    def save(self, path: Path, time: float | None = None) -> None:
        """Writes the index, all or nothing; several processes may do so at once.

        Args:
            path: of the file.
            time: the file's time of change in seconds; now by default.
        """
        names = [key.encode() for key in self.keys]
        arrays: dict[str, npt.NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(names), dtype=np.uint8),
            "key_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            "offsets": self.offsets,
            "sizes": self.sizes,
        }
        if self.shapes is not None:
            arrays["shapes"] = self.shapes
        about = {
            "format": FORMAT,
            "extensions": self.extensions,
            "records": len(self),
            "tar_bytes": self.tar_bytes,
            "last": self._last(),
            "contents": self.contents,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{uuid4().hex[:8]}")
        # In one entry: safetensors would write several in another order each time.
        save_file(arrays, partial, {ABOUT: json.dumps(about)})
        if time is not None:
            os.utime(partial, (time, time))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Reads an index.

        Raises:
            FewstepError: if the file is damaged or is no index.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = _metadata(file, path)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            blob, ends = arrays["keys"].tobytes(), arrays["key_ends"].tolist()
            return cls(
                keys=[blob[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)],
                extensions=tuple(metadata["extensions"]),
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
                tar_bytes=metadata["tar_bytes"],
                shapes=arrays.get("shapes"),
                contents=metadata.get("contents", ""),
            )
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise _damaged(path, error) from error


@dataclass(frozen=True)
class Summary:
    """What an index says of its shard as a whole.

    Attributes:
        records: their number.
        tar_bytes: size of the shard.
        has_shapes: whether the index knows heights and widths.
        last: name, offset and size of the last member.
        contents: name of what the shard holds; empty where an older version made the index.
    """

    records: int
    tar_bytes: int
    has_shapes: bool
    last: tuple[str, int, int]
    contents: str = ""

    def speaks_of(self, shard: Path) -> bool:
        """Whether a local shard still ends as it did when it was indexed.

        A shard's size alone does not tell: tars are padded.
        """
        name, offset, size = self.last
        end = offset + -(-size // BLOCK) * BLOCK
        with shard.open("rb") as file:
            file.seek(offset - BLOCK)
            header = file.read(BLOCK)
            file.seek(end)
            after = file.read(BLOCK)
        return shard.stat().st_size == self.tar_bytes and names(header, name) and not any(after)


def names(header: bytes, name: str) -> bool:
    """Whether a tar header is of the member with this name."""
    if not name.isascii() or len(name) >= NAME_BYTES:
        return True  # the name is in an extended header, further up
    return header[:NAME_BYTES].rstrip(b"\0").decode("ascii", "replace").lower() == name.lower()


def summary(path: Path) -> Summary:
    """Reads the head of an index file, which is quick for thousands of them.

    Raises:
        FewstepError: if the file is damaged or is no index.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _metadata(file, path)
            return Summary(
                records=metadata["records"],
                tar_bytes=metadata["tar_bytes"],
                has_shapes="shapes" in file.keys(),  # noqa: SIM118 (it is no mapping)
                last=tuple(metadata["last"]),
                contents=metadata.get("contents", ""),
            )
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def scan(
    shard: Path, max_member_bytes: int = MAX_MEMBER_BYTES, measure: Measure | None = None
) -> ShardIndex:
    """Reads the headers of a shard.

    Args:
        shard: a local tar.
        max_member_bytes: larger members are refused.
        measure: gives height and width from a part's extension and a function that reads its first
            bytes, or None where the part is no image; with it the index has shapes.

    Raises:
        FewstepError: if the shard is damaged, compressed, empty or holds what no shard should.
    """
    found: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for key, extension, offset, size in _members(shard, max_member_bytes):
        if not found or found[-1][0] != key:
            found.append((key, {}))
        if extension in found[-1][1]:
            raise FewstepError(f"The shard '{shard}' holds '{key}.{extension}' twice; rebuild it.")
        found[-1][1][extension] = (offset, size)
    if not found:
        raise FewstepError(f"The shard '{shard}' holds no records; remove or rebuild it.")
    extensions = tuple(sorted({extension for _, parts in found for extension in parts}))
    table = np.full((len(found), len(extensions), 2), ABSENT, dtype=np.int64)
    column = {extension: number for number, extension in enumerate(extensions)}
    for row, (_, parts) in enumerate(found):
        for extension, place in parts.items():
            table[row, column[extension]] = place
    return ShardIndex(
        keys=[key for key, _ in found],
        extensions=extensions,
        offsets=np.ascontiguousarray(table[..., 0]),
        sizes=np.ascontiguousarray(table[..., 1]),
        tar_bytes=shard.stat().st_size,
        shapes=None if measure is None else _shapes(shard, [p for _, p in found], measure),
        contents=_contents(shard, found),
    )


def _contents(shard: Path, records: list[tuple[str, dict[str, tuple[int, int]]]]) -> str:
    contents = Contents()
    with shard.open("rb") as file:
        for key, parts in records:
            for extension, (offset, size) in parts.items():
                contents.add(f"{key}.{extension}", size, file.fileno(), offset)
    return contents.name()


def _members(shard: Path, max_member_bytes: int) -> Iterator[tuple[str, str, int, int]]:
    """Key, extension, offset and size of each member that is data."""
    try:
        # "r:" refuses compressed tars, which would inflate without bound.
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                reason = _refusal(member, max_member_bytes)
                if reason:
                    raise FewstepError(
                        f"The shard '{shard}' holds '{member.name}', {reason}. Such a shard is not "
                        "read at all; rebuild it from a source you trust."
                    )
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if dot and stem:  # others, such as .DS_Store, are no part of any record
                    key = f"{folder}/{stem}" if folder else stem
                    yield key, extension.lower(), member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError) as error:
        raise FewstepError(
            f"Cannot read the shard '{shard}': {error}. Remove or rebuild it; a shard must be a "
            "plain, uncompressed tar."
        ) from error


def _refusal(member: tarfile.TarInfo, max_member_bytes: int) -> str | None:
    if not member.isreg() or member.issparse():
        return "a link, a device or a sparse file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a path that leads outside"
    if member.size > max_member_bytes:
        return f"of {member.size:,} bytes, more than max_member_bytes: {max_member_bytes:,}"
    return None


def _shapes(
    shard: Path, records: list[dict[str, tuple[int, int]]], measure: Measure
) -> npt.NDArray[np.int32]:
    shapes = np.zeros((len(records), 2), dtype=np.int32)
    with shard.open("rb") as file:
        for row, parts in enumerate(records):
            for extension, (offset, size) in parts.items():
                file.seek(offset)
                shape = measure(extension, lambda limit, size=size: file.read(min(size, limit)))  # type: ignore[misc]
                if shape is not None:
                    shapes[row] = shape
                    break
    return shapes


def _metadata(file: safe_open, path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    if about.get("format") != FORMAT:
        raise FewstepError(f"'{path}' is no index of a shard; delete it and it is made anew.")
    return about


def _damaged(path: Path, error: Exception) -> FewstepError:
    return FewstepError(f"The index '{path}' is damaged ({error}); delete it and it is made anew.")
