"""Which record goes into which shard."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datamodules.index import MAX_MEMBER_BYTES
from fewstep.errors import FewstepError
from scripts.shards.entries import Entry
from scripts.shards.parallel import bar

SHOWN = 5  # files that a message names
LOOKED_AT_ONCE = 16  # file systems on a network answer many questions at a time


@dataclass(frozen=True)
class Shard:
    """A shard to be written.

    Attributes:
        path: of the tar.
        entries: its records, in order.
    """

    path: Path
    entries: Sequence[Entry]


def check_keys(entries: Iterable[Entry]) -> None:
    """Makes sure that keys are unique.

    Raises:
        FewstepError: naming the first few that are not.
    """
    counts = Counter(entry.key for entry in entries)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise FewstepError(
            f"{len(twice):,} keys would be used more than once ({_few(twice)}). Is a file listed "
            "twice?"
        )


def look(
    entries: Sequence[Entry], skip_missing: bool, skip_large: bool, limit: int = MAX_MEMBER_BYTES
) -> tuple[list[Entry], str]:
    """Looks at every file before anything is written.

    Returns:
        The entries to write, and a hash of what they hold.

    Raises:
        FewstepError: for missing and for too large files, unless they are to be skipped.
    """
    good: list[Entry] = []
    missing: list[str] = []
    large: list[str] = []
    digest = hashlib.sha256()
    with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool, bar(len(entries), "Looking", "record") as seen:
        for entry, (stamp, absent, huge) in zip(
            entries, pool.map(_state(limit), entries), strict=True
        ):
            seen.update()
            missing += absent
            large += huge
            if not absent and not huge:
                good.append(entry)
                digest.update(f"{entry.key} {stamp}\n".encode())
    _report(missing, "files are missing", "--skip-missing", skip_missing)
    too_large = f"files are larger than a record's part may be, {limit // 2**20} MiB"
    _report(large, too_large, "--skip-large", skip_large)
    if not good:
        raise FewstepError("No records are left to write.")
    return good, digest.hexdigest()


def _state(limit: int) -> Callable[[Entry], tuple[str, list[str], list[str]]]:
    def state(entry: Entry) -> tuple[str, list[str], list[str]]:
        paths = [Path(path) for path in entry.files()]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            return "", missing, []
        return entry.stamp(), [], [str(path) for path in paths if path.stat().st_size > limit]

    return state


def _report(files: list[str], fault: str, option: str, skip: bool) -> None:
    if files and not skip:
        raise FewstepError(
            f"{len(files):,} {fault}: {_few(files)}. Mend the source, or leave such records out "
            f"with {option}. Nothing was written."
        )
    if files:
        print(f"Left out, since {len(files):,} {fault}: {_few(files)}")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def arrange(
    entries: Iterable[Entry], shuffle: int | None, val_share: float
) -> dict[str, list[Entry]]:
    """Splits and orders records by hashes of their keys alone.

    So a record that is added to the source later moves no other between the splits.

    Args:
        entries: all records.
        shuffle: seed of the order; None: alphabetical.
        val_share: share of the records, from 0 to 1, that are held out.
    """
    splits: dict[str, list[Entry]] = {"train": [], "val": []}
    for entry in entries:
        held_out = _fraction(f"split {entry.key}") < val_share
        splits[entry.split or ("val" if held_out else "train")].append(entry)
    for members in splits.values():
        members.sort(
            key=lambda entry: (
                0.0 if shuffle is None else _fraction(f"order {shuffle} {entry.key}"),
                entry.key,
            )
        )
    return splits


def _fraction(text: str) -> float:
    """A number from 0 to 1, as good as random but always the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def divide(entries: Sequence[Entry], folder: Path, prefix: str, size: int) -> list[Shard]:
    """Shards of ``size`` records, the last of which may be smaller."""
    starts = range(0, len(entries), size)
    return [
        Shard(folder / f"{prefix}-{number:06d}.tar", entries[start : start + size])
        for number, start in enumerate(starts)
    ]
