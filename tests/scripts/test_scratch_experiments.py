"""Experiments that train networks of published size from scratch, in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fewstep import networks
from fewstep.networks.gates import is_gated
from fewstep.networks.loading import load_denoiser
from scripts.experiments import known_experiments
from scripts.main import run
from scripts.suite.variants import parse

from tiny_experiments import SIZE, shards, two_updates, write_shard
from tiny_pipelines import save_stable_diffusion

FRAMES = {"imagenet": None, "videos": 3}
EXPERIMENTS = [name for name in known_experiments() if name.split("/")[0] in FRAMES]
ENCODED = "imagenet/rdm_encoded"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoded(folder: Path, pipeline: Path) -> dict[str, Any]:
    """Options of a datamodule of latents, which are made as the experiment's comment says."""
    for part in ("train", "val"):
        write_shard(folder / "raw" / f"{part}-000000.tar", None)
    made = ["--pipeline", str(pipeline), "--size", str(SIZE), "--no-text", "--latents", "moments"]
    run(["shards", "encode", str(folder / "raw"), *made, "--dest", "encoded", "--workers", "0"])
    found = {"shards": "encoded/train-*.tar", "val_shards": "encoded/val-*.tar"}
    return {**found, "batch_size": 2, "num_workers": 0}


def frames_of(experiment: str) -> int | None:
    return FRAMES[experiment.partition("/")[0]]


def small(folder: Path, experiment: str) -> Path:
    """What makes an experiment small, and nothing else of it: data, VAE, network, callbacks."""
    pipeline = save_stable_diffusion(folder / "pipeline")
    frames = frames_of(experiment)
    made = encoded(folder, pipeline) if experiment == ENCODED else shards(folder / "data", frames)
    clip = {} if frames is None else {"num_frames": frames}
    sizes = {"sample_size": SIZE // 2, "num_layers": 3, "num_heads": 2, "head_dim": 12, **clip}
    options = {"pipeline": str(pipeline), "step_counts": [2], "backbone": {"init_args": sizes}}
    config = {
        "trainer": {**two_updates(), "precision": "32-true"},
        "model": {"init_args": options},
        "data": {"init_args": made},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def trains(folder: Path, experiment: str) -> None:
    config = str(small(folder, experiment))
    run(["plan", "-c", experiment, "-c", config, "--json", "plan.json"])
    assert json.loads(Path("plan.json").read_text())["method"] == "DiffusionTraining"
    run(["fit", "-c", experiment, "-c", config, "--run.name", "tiny"])
    version = Path("runs/tiny/version_0")
    assert list((version / "samples").glob("*.png"))
    assert is_gated(load_denoiser(version).denoiser) == ("rdm" in experiment)


@pytest.mark.threads
@pytest.mark.parametrize("experiment", [ENCODED])
def test_an_experiment_is_planned_trains_and_draws(here: Path, experiment: str) -> None:
    trains(here, experiment)


@pytest.mark.slow
@pytest.mark.threads
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_planned_trains_and_draws(here: Path, experiment: str) -> None:
    trains(here, experiment)


# U-ViT-H/2 has 501 million in its paper, Latte-XL/2 674; DiT-XL/2 has 675, and diffusers' embeds
# time and class anew in each of 28 blocks, 2.8 million numbers each.
MILLIONS = {
    "imagenet/dit": (745, 755),
    "imagenet/uvit": (500, 502),
    "videos/ucf101/latte": (673, 675),
}


@pytest.mark.parametrize("experiment", list(MILLIONS))
def test_networks_have_the_published_size(experiment: str) -> None:
    backbone = parse(experiment, {})["model"]["init_args"]["backbone"]
    with torch.device("meta"):
        network = getattr(networks, backbone["class_path"].rpartition(".")[2])(
            **backbone["init_args"]
        )
    low, high = MILLIONS[experiment]
    assert low < sum(p.numel() for p in network.parameters()) / 1e6 < high


@pytest.mark.parametrize("experiment", list(MILLIONS))
def test_long_runs_are_measured_while_they_train(experiment: str) -> None:
    trainer = parse(experiment, {})["trainer"]
    (options,) = (c["init_args"] for c in trainer["callbacks"] if "Evaluation" in c["class_path"])
    assert 0 < options["every_n_updates"] < trainer["max_steps"]
    assert options["every_n_updates"] % trainer["val_check_interval"] == 0
    assert options["num_samples_in_training"] < options["num_samples"]
    assert options["max_share"] <= 0.05
