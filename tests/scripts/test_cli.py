"""The commands as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fewstep.errors import FewstepError
from scripts.experiments import known_experiments
from scripts.main import main, run

EXPERIMENTS = known_experiments()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: experiments are found in the source tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message a failing command prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    message = captured.err[captured.err.index("error:") :]
    assert len(message.strip().split("\n")) <= 6
    return message


SMALL = [
    "--trainer.max_steps",
    "4",
    "--trainer.accelerator",
    "cpu",
    "--trainer.callbacks.num_samples",
    "64",
]
TINY_NETWORK = [
    "--model.init_args.backbone.init_args.num_layers",
    "1",
    "--model.init_args.backbone.init_args.head_dim",
    "8",
]


def fit(experiment: str, *more: str, updates: int = 4) -> None:
    """Trains an experiment for a few updates."""
    config = Path("small.yaml")
    config.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "max_steps": updates,
                    "accelerator": "cpu",
                    "val_check_interval": 2,
                    "callbacks": [
                        {
                            "class_path": "callbacks.Evaluation",
                            "init_args": {
                                "metrics": [{"class_path": "fewstep.metrics.SlicedWasserstein"}],
                                "num_samples": 64,
                            },
                        },
                        {"class_path": "callbacks.Samples"},
                        {
                            "class_path": "callbacks.Checkpoints",
                            "init_args": {"every_n_updates": 2},
                        },
                        {"class_path": "callbacks.Throughput"},
                    ],
                }
            }
        )
    )
    run(["fit", "-c", experiment, "--config", "small.yaml", "--run.name", experiment, *more])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_parses(
    experiment: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(["fit", "-c", experiment, "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["model"]["class_path"].startswith("lightning_modules.")
    callbacks = [one["class_path"] for one in config["trainer"]["callbacks"]]
    assert len(callbacks) == len(set(callbacks))


def test_help_answers_at_once_and_names_every_command() -> None:
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "scripts.main", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    for command in ("fit", "validate", "evaluate", "sample", "plan", "report", "demo"):
        assert f"\n  {command}" in found.stdout
    assert "torch" not in found.stderr


def test_a_misspelt_command_is_named_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'evaluate'?" in error_of(["evalute"], capsys)


def test_a_misspelt_experiment_is_named_with_the_nearest(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Did you mean 'digits/teacher'?" in error_of(["fit", "-c", "digits/techer"], capsys)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"model": {"init_args": {"num_phase": 4}}}, "'num_phase' for lightning_modules"),
        ({"model": {"init_args": {"num_phase": 4}}}, "Did you mean 'num_phases'?"),
        ({"model": {"init_args": {"lr_decai": "cosine"}}}, "Did you mean 'lr_decay'?"),
        ({"trainer": {"max_stps": 4}}, "Did you mean 'trainer.max_steps'?"),
        ({"modle": {"class_path": "x"}}, "Did you mean 'model.class_path'?"),
        (
            {"model": {"init_args": {"optimizer": {"init_args": {"weight_dekay": 1}}}}},
            "Did you mean 'weight_decay'?",
        ),
        ({"data": {"init_args": {"batchsize": 4}}}, "Did you mean 'batch_size'?"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest(
    wrong: dict[str, Any], hint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert hint in error_of(["fit", "-c", "digits/pcm_4", "-c", "wrong.yaml"], capsys)


def test_a_value_of_the_wrong_type_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(
        ["fit", "-c", "digits/pcm_4", "--model.init_args.num_phases", "many"], capsys
    )
    assert "num_phases' must be a whole number, not 'many'." in message


NOISE = {
    "energy": {
        "class_path": "fewstep.guidance.ClassLabel",
        "init_args": {"classifier": {"class_path": "torch.nn.Flatten"}},
    },
    "rule": {"class_path": "fewstep.guidance.Scheduled", "init_args": {"strength": 1.0}},
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iterations": 0, **NOISE}, "error: Noise is optimised in 1 iteration or more, not 0"),
        (
            {**NOISE, "energy": {"class_path": "fewstep.guidance.Guidance"}},
            "guidance.energy' is wrong: Import path fewstep.guidance.Guidance does not correspond",
        ),
        ({"energy": NOISE["energy"]}, "guidance' is wrong: the following arguments are required"),
    ],
)
def test_what_one_of_several_types_refuses_is_said_alone(
    options: dict[str, Any], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steered = {"class_path": "fewstep.guidance.NoiseOptimisation", "init_args": options}
    Path("noise.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {"steering": {"init_args": {"guidance": steered}}}}})
    )
    message = error_of(["fit", "-c", "guidance/digits/few_unguided", "-c", "noise.yaml"], capsys)
    assert said in message
    assert len(message.splitlines()) == 1


def test_what_a_method_refuses_is_said_in_its_own_words(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(["fit", "-c", "digits/apt", "--model.init_args.sigma", "0"], capsys)
    assert message == "error: sigma (0.0) and time_shift (0.1) must be positive.\n"


def test_a_student_without_its_teacher_says_how_to_train_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(["fit", "-c", "digits/pcm_4"], capsys)
    assert "Train it first: fewstep fit -c experiments/digits/teacher.yaml" in message


def test_nodes_of_a_new_run_must_be_told_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(["fit", "-c", "digits/teacher", "--trainer.num_nodes", "2"], capsys)
    assert "--run.version version_0" in message
    assert not Path("runs").exists()


def test_evaluating_before_training_says_how_to_train(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(["evaluate", "-c", "digits/teacher"], capsys)
    assert "Train it first: fewstep fit -c digits/teacher" in message


def test_a_missing_shard_folder_is_one_message(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.yaml").write_text(
        "data: {class_path: datamodules.Shards, init_args: {shards: nowhere/*.tar, "
        "val_shards: nowhere/*.tar, batch_size: 4, "
        "sample: {class_path: datamodules.fields.Images}}}"
    )
    message = error_of(["fit", "-c", "digits/teacher", "-c", "data.yaml"], capsys)
    assert "the folder 'nowhere' does not exist" in message


def test_the_whole_way_from_teacher_to_report(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("digits/teacher", *TINY_NETWORK)
    fit("digits/pcm_4")
    folder = here / "runs" / "digits" / "pcm_4" / "version_0"
    for name in ("config.yaml", "metrics.csv", "results.json", "checkpoints/last.ckpt"):
        assert (folder / name).exists(), name
    assert list((folder / "tensorboard").glob("events*"))
    assert (folder / "samples" / "00000004_ema_4_steps.png").exists()

    config = str(folder / "config.yaml")
    run(
        [
            "evaluate",
            "-c",
            config,
            "--roles",
            "student",
            "teacher",
            "--steps",
            "4",
            "--seeds",
            "0",
            "1",
        ]
    )
    results = yaml.safe_load((folder / "results.json").read_text())
    assert {(m["role"], m["seed"]) for m in results["measurements"]} == {
        ("ema", 0),
        ("student", 0),
        ("student", 1),
        ("teacher", 0),
        ("teacher", 1),
    }
    assert results["training"]["samples"] == 4 * 128

    assert "serves 4 sampling steps, not 3" in error_of(
        ["evaluate", "-c", config, "--steps", "3"], capsys
    )
    run(["sample", "-c", config, "--roles", "teacher", "--steps", "2", "--count", "10"])
    assert (folder / "samples" / "00000004_teacher_2_steps.png").exists()
    run(["validate", "-c", config])
    run(["report", "runs"])
    assert "digits/pcm_4" in (here / "runs" / "report.html").read_text()

    # Resuming goes on in the same folder, and a checkpoint of another experiment is refused.
    fit("digits/pcm_4", "--ckpt_path", "last", updates=6)
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["fewstep"]["student_updates"] == 6
    assert last["fewstep"]["training"]["samples"] == 6 * 128
    assert not (folder.parent / "version_1").exists()
    teacher = here / "runs" / "digits" / "teacher" / "version_0" / "checkpoints" / "last.ckpt"
    with pytest.raises(FewstepError, match="of another experiment"):
        fit("digits/pcm_4", "--ckpt_path", str(teacher))
