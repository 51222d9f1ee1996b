"""The model card of an export: where it came from, how to call it, what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.results import FILE_NAME as RESULTS
from callbacks.results import read_results
from scripts.export.calls import Call

FRONT = """\
---
library_name: diffusers
tags:
- few-step
- distillation
---
"""

LICENCE = """\
## Licence

The licence of the base model applies to these weights. State it here before you pass them on.
"""

PICTURES = "pictures"


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    Attributes:
        name: of the exported folder.
        record: the checkpoint's metadata.
        source: the checkpoint's file, its hash and the role whose weights these are.
        scheduler: the class of the scheduler.
        calls: for each step count.
        snippets: the lines that sample, for each step count.
        precision: of the network's weights.
        notes: what a reader must know besides.
    """

    name: str
    record: dict[str, Any]
    source: dict[str, str]
    scheduler: str
    calls: Sequence[Call]
    snippets: Sequence[str]
    precision: str
    notes: Sequence[str] = field(default_factory=list)


def write_card(folder: Path, card: Card, run: Path | None) -> None:
    """Writes ``README.md`` and copies the run's newest pictures.

    Args:
        folder: the export's.
        run: folder of the run the student is of, for its measurements and pictures; None if there
            is none.
    """
    text = [FRONT, f"# {card.name}\n", _origin(card), _use(card)]
    if run is not None:
        text += [_numbers(run, card), _pictures(run, folder, card)]
    text.append(LICENCE)
    (folder / "README.md").write_text("\n".join(part for part in text if part), encoding="utf-8")


def _origin(card: Card) -> str:
    steps = ", ".join(str(call.num_steps) for call in card.calls)
    rows = [
        ("method", card.record["method"]),
        ("sampling steps", steps),
        ("student updates", str(card.record.get("student_updates", "unknown"))),
        ("weights", f"{card.source['role']}, {card.precision}"),
        ("checkpoint", f"{card.source['checkpoint']} (sha256 {card.source['sha256']})"),
    ]
    for role, origin in card.record.get("frozen", {}).items():
        sha = f" (sha256 {origin['sha256']})" if "sha256" in origin else ""
        rows.append((role, f"{origin.get('source', 'unknown')}{sha}"))
    phases = card.record.get("phases")
    if phases:
        rows.append(("phases", str(phases["num_phases"])))
        rows.append(("edges", ", ".join(f"{edge:g}" for edge in phases["edges"])))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"A few-step student, exported by fewstep.\n\n| | |\n|---|---|\n{table}\n"


def _use(card: Card) -> str:
    parts = [
        "## Use\n",
        f"The scheduler is a {card.scheduler}, set to visit exactly the times the student was "
        "trained for. Keep it, and use the step counts below: others were not trained.\n",
        *(f"{note}\n" for note in card.notes),
    ]
    for call, snippet in zip(card.calls, card.snippets, strict=True):
        visited = ", ".join(f"{t:g}" for t in call.times[:-1])
        end = "clean data" if call.times[-1] < 0 else f"{call.times[-1]:g}"
        plural = "s" if call.num_steps > 1 else ""
        parts.append(f"{call.num_steps} step{plural}, at times {visited}, ending at {end}:\n")
        parts.append(f"```python\n{snippet}\n```\n")
    return "\n".join(parts)


def _numbers(run: Path, card: Card) -> str:
    """The run's measurements of these weights, with what they are comparable under."""
    path = run / RESULTS
    if not path.is_file():
        return ""
    results = read_results(path)
    role, steps = card.source["role"], {call.num_steps for call in card.calls}
    found = [m for m in results["measurements"] if m["role"] == role and m["num_steps"] in steps]
    if not found or results.get("student_updates") != card.record.get("student_updates"):
        return ""
    names = ("metric", "num_steps", "guidance_scale", "value", "num_samples", "seed")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(_short(m[name]) for name in names)} |" for m in found]
    protocols = {m["metric"]: m["protocol"] for m in found}
    lines += ["", "Protocols:", ""]
    for metric, protocol in protocols.items():
        said = ", ".join(f"{name}: {value}" for name, value in protocol.items())
        lines.append(f"- {metric}: {said}")
    return "\n".join(["## Measured\n", *lines, ""])


def _pictures(run: Path, folder: Path, card: Card) -> str:
    """Copies the newest picture, or clip, of each step count."""
    lines = []
    for call in card.calls:
        name = f"*_{card.source['role']}_{call.num_steps}_steps"
        found = [
            sorted((run / "samples").glob(name + ending)) for ending in (".webp", ".gif", ".png")
        ]
        newest = next((paths[-1] for paths in found if paths), None)
        if newest is not None:
            (folder / PICTURES).mkdir(exist_ok=True)
            copy = f"{PICTURES}/{call.num_steps}_steps{newest.suffix}"
            shutil.copyfile(newest, folder / copy)
            lines.append(f"{call.num_steps} steps:\n\n![{call.num_steps} steps]({copy})\n")
    return "\n".join(["## Samples\n", *lines]) if lines else ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
