"""What many shards hold together: sums, duplicates, and a report for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.shards.inspection import DIGEST_BYTES, Findings, Picture
from scripts.shards.moments import Moments

NAMED = 10


@dataclass
class Census:
    """The findings in all shards, in their order.

    Attributes:
        shards: addresses.
        sums: counters and latents of all shards, joined.
        records, sizes: of each shard.
        faults: what is wrong with shards as a whole.
        corrupt: shard, key and reason of each corrupt record.
        pictures: for the contact sheet.
    """

    shards: list[str] = field(default_factory=list)
    sums: Findings = field(default_factory=lambda: Findings("all"))
    records: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    corrupt: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def add(self, found: Findings) -> None:
        """Joins the findings in one more shard."""
        self.shards.append(found.shard)
        self.records.append(found.records)
        self.sizes.append(found.size)
        if found.fault:
            self.faults[found.shard] = found.fault
        self.corrupt += [(found.shard, key, reason) for key, reason in found.corrupt]
        self.pictures += found.pictures
        for name in (
            "parts",
            "images",
            "videos",
            "frames",
            "fps",
            "seconds",
            "captions",
            "classes",
        ):
            getattr(self.sums, name).update(getattr(found, name))
        for place, moments in found.latents.items():
            self.sums.latents[place] = self.sums.latents.get(place, Moments()) + moments
        self.sums.keys += found.keys
        self.sums.contents += found.contents

    def duplicates(self, digests: bytearray) -> Duplicates:
        """Which records share a digest."""
        table: npt.NDArray[np.uint64] = np.frombuffer(digests, np.uint64).reshape(
            -1, DIGEST_BYTES // 8
        )
        (known,) = np.nonzero(table.any(axis=1))  # all zero: there was nothing to digest
        order = known[np.lexsort((known, *table[known].T))]
        same = (table[order][1:] == table[order][:-1]).all(axis=1)
        starts = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0) == 1)
        groups = []
        for start in starts[:NAMED]:
            length = int(np.argmin(np.append(same[start:], False)))
            groups.append([self._place(int(n)) for n in order[start : start + length + 1]])
        return Duplicates(int(same.sum()), groups)

    def _place(self, number: int) -> tuple[str, int]:
        ends = np.cumsum(self.records)
        shard = int(np.searchsorted(ends, number, side="right"))
        return self.shards[shard], number - int(ends[shard] - self.records[shard])


@dataclass(frozen=True)
class Duplicates:
    """Records that are there more than once.

    Attributes:
        surplus: how many records could go.
        groups: the first few groups of equals, as shard and number within it.
    """

    surplus: int
    groups: list[list[tuple[str, int]]]

    def named(self, key_of: Callable[[str, int], str]) -> list[list[str]]:
        """The groups' records by name."""
        return [
            [f"{shard.rpartition('/')[2]}/{key_of(shard, number)}" for shard, number in group]
            for group in self.groups
        ]


def facts(census: Census, key_of: Callable[[str, int], str]) -> dict[str, Any]:
    """All that is known, as plain values."""
    sums = census.sums
    keys, contents = census.duplicates(sums.keys), census.duplicates(sums.contents)
    found: dict[str, Any] = {
        "shards": len(census.shards),
        "records": sum(census.records),
        "bytes": sum(census.sizes),
        "records_per_shard": spread(Counter(census.records)),
        "bytes_per_shard": spread(Counter(census.sizes)),
        "parts": dict(sorted(sums.parts.items())),
        "damaged_shards": census.faults,
        "corrupt_records": [
            {"shard": shard, "key": key, "reason": reason} for shard, key, reason in census.corrupt
        ],
        "duplicate_keys": {"surplus": keys.surplus, "first": keys.named(key_of)},
        "duplicate_contents": {"surplus": contents.surplus, "first": contents.named(key_of)},
    }
    if sums.images:
        found["images"] = _pictured(sums.images)
    if sums.videos:
        found["videos"] = _pictured(sums.videos) | {
            name: spread(getattr(sums, name)) for name in ("frames", "fps", "seconds")
        }
    if sums.captions:
        found["captions"] = {"empty": sums.captions[0], "characters": spread(sums.captions)}
    if sums.classes:
        found["classes"] = {str(label): sums.classes[label] for label in sorted(sums.classes)}
    if sums.latents:
        found["latents"] = {f"{e} ({n} channels)": _latent(m) for (e, n), m in sums.latents.items()}
    return found


def clean(found: dict[str, Any]) -> bool:
    """Whether nothing is corrupt and nothing is there twice."""
    return not (
        found["damaged_shards"]
        or found["corrupt_records"]
        or found["duplicate_keys"]["surplus"]
        or found["duplicate_contents"]["surplus"]
    )


def spread(counts: Counter[Any]) -> dict[str, float]:
    """Least, median and greatest of counted numbers."""
    total, middle, passed = sum(counts.values()), 0.0, 0
    for value in sorted(counts):
        passed += counts[value]
        if 2 * passed >= total:
            middle = value
            break
    return {"min": min(counts, default=0), "median": middle, "max": max(counts, default=0)}


def _pictured(shapes: Counter[tuple[int, int]]) -> dict[str, Any]:
    heights: Counter[int] = Counter()
    widths: Counter[int] = Counter()
    aspects: Counter[str] = Counter()
    for (height, width), count in shapes.items():
        heights[height] += count
        widths[width] += count
        aspects[aspect(height, width)] += count
    common = {f"{w} x {h}": count for (h, w), count in shapes.most_common(NAMED)}
    return {
        "count": sum(shapes.values()),
        "width": spread(widths),
        "height": spread(heights),
        "most_common": common,
        "aspects": dict(aspects.most_common()),
    }


ASPECTS = {"9:21": 9 / 21, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0}
ASPECTS |= {"4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "21:9": 21 / 9}


def aspect(height: int, width: int) -> str:
    """The usual aspect, width to height, that is nearest by ratio."""
    logs = np.log(list(ASPECTS.values()))
    return list(ASPECTS)[int(np.abs(logs - np.log(width / height)).argmin())]


def _latent(moments: Moments) -> dict[str, Any]:
    mean, std = moments.overall()
    return {
        "mean": mean,
        "std": std,
        "channel_means": moments.mean.tolist(),
        "channel_stds": moments.std.tolist(),
    }
