"""The facts about shards, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

NAMED = 10
BAR = 30  # characters of the longest


def lines(found: dict[str, Any]) -> list[str]:
    """The report, line by line."""
    text = [
        f"{found['records']:,} records in {found['shards']:,} shards, {_size(found['bytes'])}",
        f"  a shard: {_spread(found['records_per_shard'])} records, "
        f"{_spread(found['bytes_per_shard'], _size)}",
        "  parts: " + ", ".join(_part(n, c, found["records"]) for n, c in found["parts"].items()),
    ]
    for kind in ("images", "videos"):
        if kind in found:
            text += _pictured(kind, found[kind])
    if "captions" in found:
        captions = found["captions"]
        text.append(
            f"captions: {_spread(captions['characters'])} characters, {captions['empty']:,} empty"
        )
    if "classes" in found:
        text += [f"classes: {len(found['classes'])}", *_bars(found["classes"])]
    for name, latent in found.get("latents", {}).items():
        text.append(f"{name}: mean {latent['mean']:.4f}, standard deviation {latent['std']:.4f}")
        text.append(f"  channel means {_numbers(latent['channel_means'])}")
        text.append(f"  channel standard deviations {_numbers(latent['channel_stds'])}")
    return text + _faults(found)


def _faults(found: dict[str, Any]) -> list[str]:
    text = [f"DAMAGED SHARD {name}: {why}" for name, why in found["damaged_shards"].items()]
    corrupt = found["corrupt_records"]
    if corrupt:
        text.append(f"CORRUPT: {len(corrupt):,} records")
        listed = (f"{c['shard'].rpartition('/')[2]}/{c['key']}: {c['reason']}" for c in corrupt)
        text += _few(listed, len(corrupt))
    for name, title in (("keys", "KEYS"), ("contents", "CONTENTS")):
        twice = found[f"duplicate_{name}"]
        if twice["surplus"]:
            text.append(f"DUPLICATE {title}: {twice['surplus']:,} records more than distinct ones")
            text += [f"  {' = '.join(group[:4])}" for group in twice["first"]]
    return text or ["nothing is corrupt, and nothing is there twice"]


def _few(listed: Iterable[str], count: int) -> list[str]:
    shown = [f"  {line}" for line, _ in zip(listed, range(NAMED), strict=False)]
    return shown + ([f"  and {count - NAMED:,} more"] if count > NAMED else [])


def _pictured(kind: str, of: dict[str, Any]) -> list[str]:
    text = [
        f"{kind}: {of['count']:,}, width {_spread(of['width'])}, height {_spread(of['height'])}",
        "  sizes: " + ", ".join(f"{n} ({c:,})" for n, c in of["most_common"].items()),
    ]
    if kind == "videos":
        text.append(
            f"  {_spread(of['seconds'])} s, {_spread(of['fps'])} frames a second, "
            f"{_spread(of['frames'])} frames"
        )
    return [*text, "  width to height, nearest of the usual:", *_bars(of["aspects"])]


def _bars(counts: dict[str, int]) -> list[str]:
    most = max(counts.values())
    shown = list(counts.items())[: 2 * NAMED]
    wide = max(len(name) for name, _ in shown)
    rows = [
        f"    {name:>{wide}} {count:>9,} {'#' * max(1, round(BAR * count / most))}"
        for name, count in shown
    ]
    hidden = len(counts) - len(shown)
    return rows + ([f"    and {hidden:,} more"] if hidden else [])


def _part(name: str, count: int, records: int) -> str:
    return f"{name} in all" if count == records else f"{name} in {count:,}"


def _spread(of: dict[str, float], shown: Any = None) -> str:
    """As ``least .. median .. greatest``, or one number where they are the same."""
    shown = shown or (lambda value: f"{value:,.10g}")
    if of["min"] == of["max"]:
        return str(shown(of["min"]))
    return " .. ".join(str(shown(of[name])) for name in ("min", "median", "max"))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
