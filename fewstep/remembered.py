"""What takes long to find out from files: a process finds it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Remembered:
    """Answers about files, by what was asked and by path, size and time of change of the files."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def of(self, what: Hashable, files: Sequence[Path], find: Callable[[], T]) -> T:
        """What ``find()`` returned the first time these files were asked about.

        Args:
            what: tells this question from others about the same files.
            files: all that the answer depends on; a changed one is another file.
            find: reads them.
        """
        key = (what, tuple(_stamp(path) for path in files))
        if key not in self._known:
            self._known[key] = find()
        return cast(T, self._known[key])

    def known(self) -> dict[Hashable, Any]:
        """All answers, to be told to another process of this machine."""
        return dict(self._known)

    def learn(self, told: dict[Hashable, Any]) -> None:
        """Takes over what another process of this machine has found."""
        self._known.update(told)


REMEMBERED = Remembered()


def sha256_of(*paths: Path) -> str:
    """The hash of one file, or of several one after the other, in hexadecimal digits.

    Raises:
        OSError: if one of them cannot be read.
    """
    return REMEMBERED.of("sha256", paths, lambda: _hashed(paths))


def _hashed(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns
