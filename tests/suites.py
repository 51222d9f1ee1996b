"""Suites and their runs for tests: written in an instant, as training would leave them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from scripts.suite.files import read_suite
from scripts.suite.plan import Cell, Plan, make_plan

HOME = Path("runs/x")


def write_suite(**content: Any) -> Path:
    """Writes ``x.yaml`` into the working directory."""
    path = Path("x.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def plan(*only: str, fresh: bool = False) -> Plan:
    """The plan of ``x.yaml``."""
    return make_plan(read_suite(Path("x.yaml")), HOME, only or None, fresh)


def states(found: Plan) -> dict[str, str]:
    """Each run's state by its name."""
    return {cell.name: str(cell.standing.state) for cell in found.cells}


def train(cell: Cell, update: int | None = None) -> None:
    """Leaves what training up to an update leaves."""
    update = cell.asked.max_steps if update is None else update
    shutil.copyfile(cell.prepare("local"), cell.folder / "config.yaml")
    checkpoint = cell.folder / "checkpoints" / f"update_{update:08d}.ckpt"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    link = checkpoint.with_name("last.ckpt")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)


def finish(cell: Cell, value: float = 1.0, steps: int = 4) -> None:
    """Leaves what training and measuring leave."""
    train(cell)
    measurement = {
        "metric": "frechet_digits",
        "value": value,
        "num_steps": steps,
        "network_evaluations": steps,
        "guidance_scale": 1.0,
        "role": "ema",
        "num_samples": 64,
        "seed": 0,
        "protocol": {},
    }
    content = {
        "format": 1,
        "run": cell.variant.label,
        "version": cell.folder.name,
        "method": "PhasedConsistencyDistillation",
        "student_updates": cell.asked.max_steps,
        "training": {},
        "environment": {},
        "measurements": [measurement],
    }
    (cell.folder / "results.json").write_text(json.dumps(content))
