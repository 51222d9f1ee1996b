"""The experiments of real models, on tiny pipelines and shards: they train, draw and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fewstep.errors import FewstepError
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


def test_an_experiment_shows_all_its_options(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["fit", "-c", "modelscope/mcm_images", "--print_config"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    adversary = shown["model"]["init_args"]["adversary"]
    assert adversary["class_path"] == "lightning_modules.FrameAdversary"
    assert adversary["init_args"]["normalisation"] == "group"  # which the file does not say
    assert set(shown["data"]["init_args"]) == {"videos", "images", "reference"}


@pytest.mark.parametrize(
    ("key", "owner", "meant"),
    [
        ("wieght", "lightning_modules.FrameAdversary", "weight"),
        ("features.init_args.lairs", "fewstep.networks.frames.DINOv2Features", "layers"),
    ],
)
def test_a_wrong_key_of_an_adversary_is_one_message(
    here: Path, key: str, owner: str, meant: str
) -> None:
    option = f"--model.init_args.adversary.init_args.{key}"
    with pytest.raises(FewstepError) as error:
        run(["fit", "-c", "modelscope/mcm", option, "1"])
    wrong = key.rsplit(".", maxsplit=1)[-1]
    start = f"The configuration has an unknown key '{wrong}' for {owner}. Did you mean '{meant}'?"
    assert str(error.value).startswith(start)
