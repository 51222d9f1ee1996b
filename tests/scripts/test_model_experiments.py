"""The experiments of real models, on tiny pipelines and shards: they train, draw and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.experiments import known_experiments
from scripts.main import run

from tiny_experiments import FAMILY, small

EXPERIMENTS = [
    name
    for name in known_experiments()
    if name.split("/")[0] in FAMILY and not name.endswith("_encoded")
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
