"""Checkpoints of tiny students, written as training writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.results import FILE_NAME as RESULTS
from lightning_modules import FewStepModule, PhasedConsistencyDistillation, Pretrained
from scripts.main import run

from rings import quiet_trainer


def save_student(module: FewStepModule, path: Path) -> FewStepModule:
    """Perturbs a student's weights, and differently its average's, and writes its checkpoint."""
    trainer = quiet_trainer(path.parent, [], 0)
    untouched: Any = DataLoader([0])  # type: ignore[arg-type]
    trainer.fit(module, untouched, weights_only=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for network in filter(None, (module.student, module.ema)):
            for weight in network.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    trainer.save_checkpoint(path)
    return module.eval()


def sd_student(base: Path, path: Path, **options: Any) -> FewStepModule:
    """A student of four phases, whose teacher is the pipeline's folder itself."""
    made = PhasedConsistencyDistillation(teacher=Pretrained(str(base), (16, 16)), **options)
    return save_student(made, path)


def save_run(base: Path, folder: Path) -> Path:
    """A run's folder with a checkpoint, a measurement and pictures."""
    (folder / "checkpoints").mkdir(parents=True)
    sd_student(base, folder / "checkpoints" / "last.ckpt", sampling_guidance=2.0)
    entry = {
        "metric": "frechet_inception",
        "value": 12.345678,
        "num_steps": 4,
        "network_evaluations": 8,
        "guidance_scale": 2.0,
        "role": "ema",
        "num_samples": 50,
        "seed": 0,
        "protocol": {"resize": "antialiased bicubic"},
        "better": "lower",
    }
    found = [entry, {**entry, "role": "teacher", "value": 98.7}]
    (folder / RESULTS).write_text(json.dumps({"student_updates": 0, "measurements": found}))
    (folder / "samples").mkdir()
    for updates, colour in ((10, "red"), (20, "green")):
        picture = Image.new("RGB", (4, 4), colour)
        picture.save(folder / "samples" / f"{updates:08d}_ema_4_steps.png")
    return folder


def export(*arguments: object) -> None:
    """Runs ``fewstep export``."""
    run(["export", *map(str, arguments)])
