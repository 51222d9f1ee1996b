"""What becomes a record: its key, and where its parts come from."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datamodules.moving_clips import Kind, Scene, Split, moving_digits_record

MEDIA = ("jpg", "jpeg", "png", "webp", "mp4", "webm", "mkv", "mov")
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth")  # some readers would run what is in them
UNSAFE = re.compile(r"[^\w/-]+")


def safe_key(path: str) -> str:
    """A key made of a file's relative path without its extension, and of nothing else.

    Folders stay. WebDataset ends a key at the first dot of a name, so dots and whatever else is
    awkward become ``_``; a changed key gets a few digits of the path's hash, by which ``a.b`` and
    ``a_b`` stay apart.
    """
    key = UNSAFE.sub("_", path).strip("/")
    if key == path:
        return key
    return f"{key}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Entry(ABC):
    """A record to be.

    Attributes:
        key: its name.
        split: ``train`` or ``val`` where the source says so; otherwise the plan decides.
    """

    key: str
    split: Split | None

    @abstractmethod
    def parts(self) -> dict[str, bytes]:
        """The record's parts by extension."""

    @abstractmethod
    def stamp(self) -> str:
        """Changes when the parts do."""

    def files(self) -> tuple[str, ...]:
        """The files it is read from."""
        return ()


@dataclass(frozen=True)
class Files(Entry):
    """A record of files, and of values that are known already.

    Attributes:
        paths: extension and path of each file.
        values: extension and contents of others, such as a table's captions.
    """

    paths: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, bytes], ...] = ()

    def parts(self) -> dict[str, bytes]:
        read = {extension: Path(path).read_bytes() for extension, path in self.paths}
        return {**read, **dict(self.values)}

    def stamp(self) -> str:
        sizes = []
        for extension, path in self.paths:
            state = Path(path).stat()
            sizes.append((extension, state.st_size, state.st_mtime_ns))
        return repr((sizes, self.values))

    def files(self) -> tuple[str, ...]:
        return tuple(path for _, path in self.paths)


@dataclass(frozen=True)
class MovingDigit(Entry):
    """A clip, or a crisp image, of moving digits, drawn when it is written."""

    number: int
    seed: int
    kind: Kind
    scene: ClassVar[Scene] = Scene()

    def parts(self) -> dict[str, bytes]:
        assert self.split is not None
        made = moving_digits_record(self.number, self.seed, self.kind, self.split, self.scene)
        return {
            name: value.encode() if isinstance(value, str) else value
            for name, value in made.items()
            if not name.startswith("__")
        }

    def stamp(self) -> str:
        return repr((self.number, self.seed, self.kind))
