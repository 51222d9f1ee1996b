"""What makes the experiments of real models small: tiny pipelines, a few pictures, two updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules.moving_clips import encode_mp4

from shard_files import encoded, write_tar
from tiny_pipelines import save_text_model
from tiny_transformers import SAVES

FAMILY = {
    "sd15": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "modelscope": "modelscope",
    "animatediff": "animatediff",
    "wan": "wan",
}
FRAMES = {"modelscope": 3, "animatediff": 3, "wan": 5}
SIZE = 16


def write_shard(path: Path, frames: int | None) -> None:
    """Six captioned noisy pictures, or clips, each of a class."""
    random = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    for number in range(6):
        shape = (24, 24, 3) if frames is None else (frames + 2, 24, 24)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        name, data = ("mp4", encode_mp4(pixels, 8)) if frames else ("png", encoded(pixels))
        members[f"{number}.{name}"] = data
        members[f"{number}.txt"] = f"caption {number}".encode()
        members[f"{number}.cls"] = str(number).encode()
    write_tar(path, members)


def two_updates() -> dict[str, Any]:
    """Options of a trainer that makes two updates and draws two pictures."""
    samples = {"count": 2, "columns": 2, "batch_size": 2}
    return {
        "max_steps": 2,
        "accelerator": "cpu",
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "callbacks": [
            {"class_path": "callbacks.Samples", "init_args": samples},
            {"class_path": "callbacks.Checkpoints"},
        ],
    }


def teacher(folder: Path, **options: Any) -> dict[str, Any]:
    """A tiny pipeline as a teacher."""
    given = {"folder": str(folder), "size": [SIZE, SIZE], **options}
    return {"class_path": "lightning_modules.Pretrained", "init_args": given}


def shards(folder: Path, frames: int | None) -> dict[str, Any]:
    """Options of a datamodule that reads a small shard, which is made."""
    for part in ("train", "val"):
        write_shard(folder / f"{part}-000000.tar", frames)
    clip = {"frames": frames, "fps": None, "stride": 1} if frames else {}
    field = "datamodules.fields." + ("Videos" if frames else "Images")
    return {
        "shards": str(folder / "train-*.tar"),
        "val_shards": str(folder / "val-*.tar"),
        "batch_size": 2,
        "num_workers": 0,
        "sample": {"class_path": field, "init_args": {"size": SIZE, **clip}},
    }


def judge(folder: Path) -> dict[str, Any]:
    """A small frozen network for a frame adversary, and a small CLIP."""
    save_text_model(folder)
    features = "fewstep.networks.frames.ConvolutionFeatures"
    return {
        "features": {"class_path": features, "init_args": {"widths": [4, 8]}},
        "condition": {"init_args": {"source": str(folder)}},
    }


def small(folder: Path, experiment: str) -> Path:
    """What makes an experiment small, and nothing else of it."""
    model, name = experiment.split("/", maxsplit=1)
    frames = FRAMES.get(model)
    pipeline = SAVES[FAMILY[model]](folder / "pipeline")
    data = shards(folder / "data", frames)
    # As many parts as there are samples: an update of 128 parts would take 128 passes here too.
    options: dict[str, Any] = {"teacher": teacher(pipeline, frames=frames), "accumulate": 2}
    if "pcm" in name:
        options["num_grid_points"] = 20
    if experiment == "sdxl/pcm_4_adversarial":
        options["discriminator_blocks"] = ["network.down_blocks.0", "network.mid_block"]
    if "apt" in name and "init" not in name:
        options["start"] = teacher(pipeline, frames=frames)
    if name.startswith("mcm"):
        options["adversary"] = {"init_args": judge(folder / "clip")}
    if name == "mcm_images":
        pictures = {**shards(folder / "pictures", None), "batch_size": 4}
        data = {"videos": {"init_args": data}, "images": {"init_args": pictures}}
    config = {
        "trainer": two_updates(),
        "model": {"init_args": options},
        "data": {"init_args": data},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
