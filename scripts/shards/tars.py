"""Writing shards and their indexes, all or nothing, the same bytes whoever writes them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from datamodules.index import SUFFIX, Measure, scan, summary
from fewstep.errors import FewstepError

PARTIAL = ".partial-"


def index_path(shard: Path) -> Path:
    """Where a local shard's index lies."""
    return shard.with_name(shard.name + SUFFIX)


def whole(shard: Path, records: int | None = None, shapes: bool = False) -> bool:
    """Whether a shard and its index are there and belong together.

    Args:
        shard: a local tar.
        records: how many it should hold; None: any number.
        shapes: whether its index must have the images' heights and widths.
    """
    if not shard.exists() or not index_path(shard).exists():
        return False
    try:
        about = summary(index_path(shard))
        fits = about.speaks_of(shard)
    except (FewstepError, OSError):
        return False
    return fits and (about.has_shapes or not shapes) and records in (None, about.records)


@contextmanager
def all_or_nothing(path: Path) -> Iterator[Path]:
    """Gives a file to write instead, which takes the path's place only if all went well."""
    for stale in path.parent.glob(f"{path.name}{PARTIAL}*"):  # of a run that was killed
        stale.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid4().hex[:8]}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_shard(
    path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]], measure: Measure | None = None
) -> int:
    """Writes a shard and its index.

    Args:
        path: of the tar.
        records: keys, and parts by extension; parts are written in alphabetical order.
        measure: see :func:`~datamodules.index.scan`.

    Returns:
        The number of records.
    """
    with all_or_nothing(path) as partial:
        # GNU's format keeps long and accented names in one piece; PAX would change them in headers.
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for key, parts in records:
                for extension in sorted(parts):
                    _add(tar, f"{key}.{extension}", parts[extension])
        index = scan(partial, measure=measure)
    index.save(index_path(path))
    return len(index)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no owner and no time, which would differ from run to run
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def agree(path: Path, settings: dict[str, Any], remedy: str) -> None:
    """Notes with which settings a folder is filled, or compares with what was noted.

    Several processes may do so at once.

    Args:
        path: of the note.
        settings: plain values.
        remedy: what to do where they differ.

    Raises:
        FewstepError: if the folder was begun with other settings; names the differences.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid4().hex[:8]}")
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    try:
        os.link(partial, path)  # unlike a rename, it never replaces what another process noted
    except FileExistsError:
        _compare(path, settings, remedy)
    finally:
        partial.unlink()


def _compare(path: Path, settings: dict[str, Any], remedy: str) -> None:
    try:
        noted = json.loads(path.read_text())
        assert isinstance(noted, dict)
    except (ValueError, AssertionError) as error:
        raise FewstepError(f"'{path}' is damaged; remove '{path.parent}' and run again.") from error
    differences = [
        f"{name} was {noted.get(name)!r} and is now {settings.get(name)!r}"
        for name in sorted({*noted, *settings})
        if noted.get(name) != settings.get(name)
    ]
    if differences:
        raise FewstepError(
            f"'{path.parent}' was begun with other settings: {'; '.join(differences)}. {remedy}"
        )
