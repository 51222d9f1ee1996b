"""The experiments of real models, on tiny pipelines and shards: they train, draw and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from datamodules.moving_clips import encode_mp4
from scripts.experiments import known_experiments
from scripts.main import run

from shard_files import encoded, write_tar
from tiny_transformers import SAVES

FAMILY = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "animatediff": "animatediff", "wan": "wan"}
FRAMES = {"animatediff": 3, "wan": 5}
EXPERIMENTS = [name for name in known_experiments() if name.split("/")[0] in FAMILY]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_shard(path: Path, frames: int | None) -> None:
    """Six captioned noisy pictures, or clips."""
    random = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    for number in range(6):
        shape = (24, 24, 3) if frames is None else (frames + 2, 24, 24)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        name, data = ("mp4", encode_mp4(pixels, 8)) if frames else ("png", encoded(pixels))
        members[f"{number}.{name}"] = data
        members[f"{number}.txt"] = f"caption {number}".encode()
    write_tar(path, members)


def small(folder: Path, experiment: str) -> Path:
    """What makes an experiment small, and nothing else of it."""
    model = experiment.split("/", maxsplit=1)[0]
    frames = FRAMES.get(model)
    pipeline = SAVES[FAMILY[model]](folder / "pipeline")
    for part in ("train", "val"):
        write_shard(folder / "data" / f"{part}-000000.tar", frames)
    clip = {"frames": frames, "fps": None, "stride": 1} if frames else {}
    field: dict[str, Any] = {"size": 16, **clip}
    options: dict[str, Any] = {
        "teacher": {
            "class_path": "lightning_modules.Pretrained",
            "init_args": {"folder": str(pipeline), "size": [16, 16], "frames": frames},
        },
    }
    if "pcm" in experiment:
        options["num_grid_points"] = 20
    if experiment == "sdxl/pcm_4_adversarial":
        options["discriminator_blocks"] = ["network.down_blocks.0", "network.mid_block"]
    config = {
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "val_check_interval": 2,
            "limit_val_batches": 1,
            "callbacks": [
                {
                    "class_path": "callbacks.Samples",
                    "init_args": {"count": 2, "columns": 2, "batch_size": 2},
                },
                {"class_path": "callbacks.Checkpoints"},
            ],
        },
        "model": {"init_args": options},
        "data": {
            "init_args": {
                "shards": str(folder / "data" / "train-*.tar"),
                "val_shards": str(folder / "data" / "val-*.tar"),
                "batch_size": 2,
                "num_workers": 0,
                "sample": {
                    "class_path": "datamodules.fields." + ("Videos" if frames else "Images"),
                    "init_args": field,
                },
            }
        },
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def trains(folder: Path, experiment: str) -> None:
    config = str(small(folder, experiment))
    command = ["fit", "-c", experiment, "-c", config, "--run.name", "tiny"]
    run(command)
    version = Path("runs/tiny/version_0")
    assert (version / "checkpoints" / "last.ckpt").resolve().name == "update_00000002.ckpt"
    assert list((version / "samples").glob("*.png"))
    run([*command, "--ckpt_path", "last", "--trainer.max_steps", "3"])
    assert (version / "checkpoints" / "update_00000003.ckpt").exists()


@pytest.mark.parametrize("experiment", ["sd15/pcm_2_adversarial"])
def test_an_experiment_trains_draws_and_resumes(here: Path, experiment: str) -> None:
    trains(here, experiment)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_draws_and_resumes(here: Path, experiment: str) -> None:
    trains(here, experiment)
