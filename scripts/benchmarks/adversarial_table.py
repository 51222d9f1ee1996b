"""What the benchmark of adversarial PCM prints: a table, its ratios, and what bounds them."""

from __future__ import annotations

import platform
from typing import Any

import torch

from scripts.benchmarks.adversarial import Settings
from scripts.benchmarks.stopwatch import ROLES
from scripts.plan.table import size_text

AIMS = {"time": 0.75, "memory": 0.6}
MEANING = {
    "cuda": "torch.cuda.max_memory_allocated of later steps, each side in a process of its own",
    "cpu": "peak resident memory of a process of each side's own during later steps, above what "
    "was resident before its networks were built",
}


def report(settings: Settings, found: dict[str, Any]) -> str:
    """The table and what bounds its ratios."""
    cuda = settings.device == "cuda"
    place = torch.cuda.get_device_name() if cuda else platform.processor() or "CPU"
    trained, channels = found["trained"], ", ".join(map(str, settings.channels))
    on_both = [
        w
        for w, is_on in (("compiled", settings.compiled), ("checkpointed", settings.checkpoint))
        if is_on
    ]
    lines = [
        f"U-Net of {found['parameters'] / 1e6:.1f} M parameters ({channels}), LoRA of rank "
        f"{settings.rank} ({trained['student'] / 1e6:.1f} M), heads "
        f"({trained['discriminator'] / 1e6:.1f} M)",
        f"latents 4 x {settings.latent} x {settings.latent}, batch {settings.batch}, "
        f"{', '.join([settings.dtype, *on_both])}; {place}, torch {torch.__version__}",
        f"medians over {settings.blocks} blocks of {settings.steps} steps; memory: "
        f"{MEANING[settings.device]}",
        "",
        f"{'':16s}{'a step':>12s}{'samples/s':>11s}{'peak memory':>13s}{'evaluations':>13s}"
        + "".join(f"{role:>15s}" for role in ROLES),
    ]
    lines += [_row(name, settings, found) for name in found["ways"]]
    return "\n".join([*lines, "", *_ratios(found), "", *_bounds(found)])


def _memory_of(name: str, found: dict[str, Any]) -> dict[str, int]:
    """Turns change nothing about the networks that there are."""
    memory: dict[str, dict[str, int]] = found["memory"]
    return memory["ours" if name == "ours" else "straightforward"]


def _evaluations(way: dict[str, Any]) -> tuple[int, int]:
    return sum(way["forward"].values()), sum(way["backward"].values())


def _row(name: str, settings: Settings, found: dict[str, Any]) -> str:
    way = found["ways"][name]
    seconds, (forward, backward) = way["seconds"], _evaluations(way)
    taken = f"{1000 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
    peak = "as above" if name == "alternating" else size_text(_memory_of(name, found)["peak"])
    return (
        f"{name:16s}{taken:>12s}{settings.batch / seconds:>11,.2f}{peak:>13s}"
        f"{f'{forward} + {backward}':>13s}"
        + "".join(f"{way['shares'][role]:>15.0%}" for role in ROLES)
    ).rstrip()


def _ratios(found: dict[str, Any]) -> list[str]:
    ways, mine = found["ways"], found["ways"]["ours"]
    lines = []
    for name in ("straightforward", "alternating"):
        time = mine["seconds"] / ways[name]["seconds"]
        lines.append(f"time, ours / {name:16s} {time:5.2f}  {_judged(time, 'time')}")
    memory = found["memory"]["ours"]["peak"] / found["memory"]["straightforward"]["peak"]
    lines.append(f"memory, ours / straightforward {memory:4.2f}  {_judged(memory, 'memory')}")
    return lines


def _judged(ratio: float, what: str) -> str:
    return f"aim {AIMS[what]}: {'reached' if ratio <= AIMS[what] else 'not reached'}"


def _bounds(found: dict[str, Any]) -> list[str]:
    lines = ["Evaluations of the U-Net for a batch, forward + backward, and calls of it:"]
    for name, way in found["ways"].items():
        by_role = ", ".join(
            f"{role} {way['forward'][role]} + {way['backward'].get(role, 0)}"
            for role in ROLES
            if role in way["forward"]
        )
        lines.append(f"  {name:16s}{by_role}; {way['calls']} calls")
    mine = sum(_evaluations(found["ways"]["ours"]))
    expected = [
        f"{mine / sum(_evaluations(found['ways'][name])):.2f} ({name})"
        for name in ("straightforward", "alternating")
    ]
    lines.append(f"  were all as costly, the ratios of time would be {', '.join(expected)}")
    lines.append("Memory: what is held between steps, and what a step needs beside it:")
    memory = found["memory"]
    for name, found_there in memory.items():
        beside = found_there["peak"] - found_there["held"]
        held = size_text(found_there["held"])
        lines.append(f"  {name:16s}{held} and {size_text(beside)}")
    held = memory["ours"]["held"] / memory["straightforward"]["held"]
    lines.append(
        f"  of what is held alone the ratio is {held:.2f}; activations, alike on both sides, bring "
        "it nearer to 1"
    )
    return lines
