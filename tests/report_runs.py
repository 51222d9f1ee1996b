"""Synthetic runs for the report's tests, and ways to read the page that comes of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import torch
import yaml

from callbacks.clips import encode
from callbacks.pictures import save_picture
from scripts.loggers import MetricsCSV
from scripts.report import build_report

METRIC = "frechet_digit_classifier"
TEACHER, LCM, PCM = "DiffusionTraining", "ConsistencyDistillation", "PhasedConsistencyDistillation"
PROTOCOL = {"metric": METRIC, "features": {"name": "digit_classifier", "weights_sha256": "0fdc"}}
TRAINING = {
    "seconds": 20.0,
    "devices": 2,
    "device_hours": 0.0125,
    "samples": 64000,
    "forward_equivalents_per_sample": 5,
}


def measured(
    values: dict[int, float | list[float]], role: str = "ema", guidance: int = 1, **changes: Any
) -> list[dict[str, Any]]:
    """Measurements by step count; a list of values is one a seed."""
    return [
        {
            "metric": METRIC,
            "value": value,
            "num_steps": steps,
            "network_evaluations": guidance * steps,
            "guidance_scale": 1.0,
            "role": role,
            "num_samples": 2048,
            "seed": seed,
            "protocol": PROTOCOL,
        }
        | changes
        for steps, given in values.items()
        for seed, value in enumerate(given if isinstance(given, list) else [given])
    ]


def make_run(
    root: Path,
    name: str,
    method: str,
    measurements: list[dict[str, Any]],
    *,
    version: str = "version_0",
    curves: int = 40,
    pictures: bool = True,
    config: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    updates: Sequence[int] = (600,),
    clips: bool = False,
) -> Path:
    """A run's folder as training leaves it."""
    folder = root / name.replace("<", "").replace(">", "") / version
    folder.mkdir(parents=True)
    content = {
        "format": 1,
        "run": name,
        "version": version,
        "method": method,
        "student_updates": updates[-1],
        "training": TRAINING if training is None else training,
        "environment": {"torch": "2.14.1", "device": "cpu"},
        "measurements": measurements,
    }
    (folder / "results.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in range(curves):
        loss = math.exp(-step / 20) + 0.05 * (step % 3)
        MetricsCSV(folder).log_metrics({"train/loss": loss, "epoch": 0}, step)
    for m in measurements if pictures else ():
        for at in updates:
            path = folder / "samples" / f"{at:08d}_{m['role']}_{m['num_steps']}_steps.png"
            save_picture(torch.randint(0, 255, (3, 37, 91), dtype=torch.uint8), path)
            if clips:
                frames = torch.randint(0, 255, (6, 3, 37, 91), dtype=torch.uint8)
                path.with_suffix(".webp").write_bytes(encode(frames, 8, "webp"))
    return folder


def page_of(root: Path, **options: Any) -> str:
    """The report of everything below a folder."""
    return build_report([root], root / "report.html", **options).read_text(encoding="utf-8")


def rows_of(page: str) -> dict[str, list[str]]:
    """The leaderboard's rows as plain text cells, by their label."""
    table = page.split('id="leaderboard"')[1].split("</table>", maxsplit=1)[0]
    found = {}
    for row in re.findall(r"<tr.*?</tr>", table):
        head, *cells = re.findall(r"<t[hd].*?</t[hd]>", row)
        found[plain(head.split("<small>")[0])] = [plain(cell) for cell in cells]
    return found


def plain(html: str) -> str:
    """Text without tags."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def section(page: str, anchor: str) -> str:
    """The text of one section."""
    return plain(page.split(f'<section id="{anchor}">')[1].split("</section>", maxsplit=1)[0])


def demo_runs(root: Path) -> Path:
    """A teacher, an LCM student and a PCM student that is a little worse than the teacher."""
    make_run(root, "digits/lcm", LCM, measured({1: 4.0, 4: 0.63}))
    make_run(root, "digits/pcm_4", PCM, measured({4: 0.315}))
    make_run(root, "digits/teacher", TEACHER, measured({4: 1.8, 50: 0.3}))
    return root


def data_of(page: str) -> dict[str, Any]:
    """What the page's scripts work on."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))
