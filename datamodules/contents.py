"""Names for contents: a short hash that tells data sets apart without reading all of their bytes.

It covers the names, sizes and order of all parts, and of each part a sample of its bytes: all of a
small one, otherwise the first ``SAMPLED`` and as many from its middle. A change that keeps a large
part's size and touches none of these bytes goes unnoticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

SAMPLED = 512  # bytes; one of them follows a tar's header, which is read anyway
DIGITS = 32  # hexadecimal


class Contents:
    """Takes parts in one by one, and then has a name for them all."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, size: int, file: int | None = None, offset: int = 0) -> None:
        """Takes in one part.

        Args:
            name: what it is called.
            size: its bytes.
            file: a descriptor to sample these from; None takes in name and size alone.
            offset: where it begins in the file.
        """
        self._hash.update(f"{len(name)} {name} {size}\n".encode())
        if file is None:
            return
        if size <= 2 * SAMPLED:
            self._hash.update(os.pread(file, size, offset))
            return
        for start in (offset, offset + size // 2):
            self._hash.update(os.pread(file, SAMPLED, start))

    def name(self) -> str:
        """The hash of what was taken in so far, in hexadecimal digits."""
        return self._hash.hexdigest()[:DIGITS]


def name_of_files(folder: Path, files: Iterable[Path]) -> str:
    """A name for the contents of files, called by their paths below a folder."""
    contents = Contents()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            contents.add(path.relative_to(folder).as_posix(), size, file.fileno())
    return contents.name()
