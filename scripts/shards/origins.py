"""The records of a folder, of a table or of a built-in data set."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.digits import write_digit_shards
from datamodules.index import scan
from datamodules.moving_clips import Kind, Split
from fewstep.errors import FewstepError, nearest
from scripts.shards.entries import MEDIA, PICKLES, Entry, Files, MovingDigit, safe_key

MOVING: dict[str, Kind] = {
    "moving-digits": "clear",
    "moving-digits-watermarked": "watermarked",
    "moving-digits-crisp": "crisp",
}
BUILT_IN = ("digits", *MOVING)
ROWS_AT_ONCE = 16_384


@dataclass
class Origin:
    """What a source holds.

    Attributes:
        entries: its records.
        classes: names of the class labels, if they were made from names.
        ignored: files that are part of no record.
    """

    entries: list[Entry]
    classes: list[str] | None = None
    ignored: int = 0


# ---------------------------------------------------------------------- folders


def from_folder(folder: Path, labels: bool = False) -> Origin:
    """Every media file below a folder, with the files that share its name.

    Args:
        folder: searched recursively; hidden files and folders are left out.
        labels: whether the first-level folders are classes.
    """
    origin = Origin([])
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in names if not name.startswith("."))
        records, ignored = _grouped(visible)
        origin.ignored += ignored
        relative = Path(where).relative_to(folder).as_posix()
        for stem, parts in records.items():
            key = safe_key(stem if relative == "." else f"{relative}/{stem}")
            paths = tuple((kind, os.path.join(where, name)) for kind, name in parts.items())  # noqa: PTH118
            origin.entries.append(Files(key, None, paths))
    if not origin.entries:
        raise FewstepError(
            f"There is no media file below '{folder}' ({', '.join(MEDIA)} are looked for)."
        )
    return _labelled_by_folder(origin, folder) if labels else origin


def _grouped(names: Sequence[str]) -> tuple[dict[str, dict[str, str]], int]:
    """The files of one folder by stem and extension, and how many have no media file."""
    stems = {name.rpartition(".")[0] for name in names if _extension(name) in MEDIA} - {""}
    records: dict[str, dict[str, str]] = {}
    ignored = 0
    for name in names:
        stem = _longest_stem(name, stems)
        if stem is None or _extension(name) in PICKLES:
            ignored += 1
            continue
        kind = name[len(stem) + 1 :].lower()
        parts = records.setdefault(stem, {})
        if kind in parts:
            raise FewstepError(
                f"'{parts[kind]}' and '{name}' would be the same part of one record; rename one."
            )
        parts[kind] = name
    return records, ignored


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _longest_stem(name: str, stems: set[str]) -> str | None:
    """Of ``cat.01.txt``, ``cat.01`` if there is such a media file, otherwise ``cat``."""
    end = name.rfind(".")
    while end > 0:
        if name[:end] in stems:
            return name[:end]
        end = name.rfind(".", 0, end)
    return None


def _labelled_by_folder(origin: Origin, folder: Path) -> Origin:
    names: list[str] = []
    for entry in origin.entries:
        parts = Path(entry.files()[0]).relative_to(folder).parts
        if len(parts) < 2:
            raise FewstepError(
                f"'{entry.files()[0]}' lies in none of the folders that --labels folders makes "
                "classes of; move it into one."
            )
        names.append(parts[0])
    return _named(origin, names)


def _named(origin: Origin, names: Sequence[str]) -> Origin:
    """Numbers the class names alphabetically and gives each record its number."""
    classes = sorted(set(names))
    number = {name: str(index) for index, name in enumerate(classes)}
    return replace(_numbered(origin, [number[name] for name in names]), classes=classes)


def _numbered(origin: Origin, labels: Sequence[str]) -> Origin:
    entries: list[Entry] = []
    for entry, label in zip(origin.entries, labels, strict=True):
        assert isinstance(entry, Files)
        entries.append(replace(entry, values=(*entry.values, ("cls", label.encode()))))
    return replace(origin, entries=entries)


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    path: str = "path"
    caption: str | None = None
    label: str | None = None
    json: tuple[str, ...] = ()

    def all(self) -> list[str]:
        """Their names, each once."""
        named = [self.path, self.caption, self.label, *self.json]
        return list(dict.fromkeys(name for name in named if name is not None))


def from_table(table: Path, columns: Columns, root: Path | None = None) -> Origin:
    """One record a row of a CSV or Parquet file.

    Args:
        table: the file.
        columns: which of its columns to use.
        root: what relative paths are relative to; the table's folder by default.
    """
    root = root or table.parent
    entries: list[Entry] = []
    labels: list[str] = []
    for number, row in enumerate(_rows(table, columns.all())):
        path = str(row[columns.path] or "")
        if _extension(path) not in MEDIA:
            raise FewstepError(
                f"Row {number + 1} of '{table}' has '{path}' in its column '{columns.path}', "
                f"which is no media file ({', '.join(MEDIA)})."
            )
        full = root / path
        relative = full.relative_to(root) if full.is_relative_to(root) else full
        key = safe_key(relative.with_name(full.stem).as_posix().lstrip("/"))
        entries.append(Files(key, None, ((_extension(path), str(full)),), _values(row, columns)))
        if columns.label is not None:
            labels.append(str(row[columns.label]))
    if not entries:
        raise FewstepError(f"The table '{table}' has no rows.")
    return _labelled(Origin(entries), labels) if labels else Origin(entries)


def _values(row: dict[str, Any], columns: Columns) -> tuple[tuple[str, bytes], ...]:
    values: list[tuple[str, bytes]] = []
    if columns.caption is not None and row[columns.caption] is not None:
        values.append(("txt", str(row[columns.caption]).encode()))
    if columns.json:
        facts = {name: row[name] for name in columns.json}
        values.append(("json", json.dumps(facts, ensure_ascii=False, default=str).encode()))
    return tuple(values)


def _labelled(origin: Origin, labels: list[str]) -> Origin:
    """Takes whole numbers as they are; other labels are names, and are numbered."""
    if all(label.isdecimal() for label in labels):
        return _numbered(origin, [str(int(label)) for label in labels])
    return _named(origin, labels)


def _rows(table: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    if _extension(table.name) == "csv":
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check(table, columns, reader.fieldnames or [])
            yield from reader
        return
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]  # ships no types
    except ImportError as error:
        raise FewstepError(
            "Parquet tables need pyarrow; install it: pip install 'fewstep[parquet]'."
        ) from error
    with parquet.ParquetFile(table) as file:
        _check(table, columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()


def _check(table: Path, columns: Sequence[str], there: Sequence[str]) -> None:
    for name in columns:
        if name not in there:
            raise FewstepError(
                f"The table '{table}' has no column '{name}'.{nearest(name, there)} "
                f"Its columns: {', '.join(there)}."
            )


# ---------------------------------------------------------------------- built-in sets


def from_built_in(name: str, num_clips: int, num_held_out: int, seed: int) -> Origin:
    """One of :data:`BUILT_IN`; the arguments are about moving digits."""
    if name == "digits":
        return _digits()
    counts: dict[Split, int] = {"train": num_clips, "val": num_held_out}
    return Origin(
        [
            MovingDigit(f"{split}-{number:06d}", split, number, seed, MOVING[name])
            for split, count in counts.items()
            for number in range(count)
        ]
    )


def _digits() -> Origin:
    entries: list[Entry] = []
    splits: tuple[Split, ...] = ("train", "val")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "digits"
        write_digit_shards(folder)
        for split in splits:
            for shard in sorted(folder.glob(f"{split}-*.tar")):
                data, index = shard.read_bytes(), scan(shard)
                for number in range(len(index)):
                    record = index.record(number, str(shard))
                    values = tuple((e, data[a : a + n]) for e, (a, n) in record.parts.items())
                    entries.append(Files(record.key, split, (), values))
    return Origin(entries)
