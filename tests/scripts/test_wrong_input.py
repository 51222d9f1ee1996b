"""What a user may well get wrong on the command line: one message each, and nothing is left."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from datamodules import Digits, RingData
from fewstep.errors import FewstepError
from lightning_modules import ConsistencyDistillation
from scripts.main import main, run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command says."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    return line.removeprefix("error: ")


STEPS = "--steps counts sampling steps and needs numbers of at least 1, not"


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("evaluate", "--steps 0", f"{STEPS} 0."),
        ("evaluate", "--steps 4 -2 --seeds 1", f"{STEPS} -2."),
        ("sample", "--steps 1 0", f"{STEPS} 0."),
        ("evaluate", "--num_samples 0", "--num_samples must be at least 1, not 0."),
        ("sample", "--count -1", "--count must be at least 1, not -1."),
        ("plan", "--devices 0", "--devices must be at least 1, not 0."),
        ("evaluate", "--seeds 0 -1", "--seeds takes whole numbers from 0 to 4294967295, not -1."),
        ("fit", "--seed_everything -1", "--seed_everything takes whole numbers from 0 to"),
        ("fit", "--model.init_args.step_counts [4,0]", "step_counts must be at least 1, not 0."),
        ("fit", "--data.init_args.batch_size -4", "batch_size must be at least 1, not -4."),
    ],
)
def test_a_number_that_is_too_small_is_refused(
    command: str, options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of([command, "-c", "digits/teacher", *options.split()], capsys)
    assert message.startswith(said)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("accelerator gpu", "but torch finds no GPU on this machine. Use --trainer.accelerator"),
        ("devices 0", "trainer.devices must be at least 1"),
        ("max_steps -5", "trainer.max_steps must be 0 or more, or -1 for no end, not -5."),
        ("accumulate_grad_batches 2", "Use model.init_args.accumulate."),
        ("gradient_clip_val 1.0", "Use model.init_args.gradient_clip."),
        ("strategy ddpp", "invalid strategy name: `strategy='ddpp'`"),
        ("limit_val_batches -3", "Lightning refuses this: You have passed invalid value -3"),
    ],
)
def test_what_the_trainer_cannot_do_is_one_message(
    options: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    option, value = options.split()
    arguments = ["fit", "-c", "digits/teacher", f"--trainer.{option}", value]
    assert said in error_of(arguments, capsys)
    assert not Path("runs").exists()


def test_a_demo_needs_seeds_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(["demo", "--seeds", "0", "-1"], capsys).endswith("not -1.")
    assert not Path("runs").exists()


@pytest.mark.parametrize("number", [0, -4])
def test_data_come_in_batches_of_at_least_one(number: int) -> None:
    for data in (Digits, RingData):
        with pytest.raises(FewstepError, match=f"batch_size must be at least 1, not {number}"):
            data(batch_size=number)
    with pytest.raises(FewstepError, match="num_workers must be at least 0, not -1"):
        Digits(num_workers=-1)


def test_a_method_is_measured_at_one_step_or_more() -> None:
    with pytest.raises(FewstepError, match="step_counts must be at least 1, not -1"):
        ConsistencyDistillation("nowhere", step_counts=[1, -1])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("num_phases many", "num_phases' must be a whole number, not 'many'."),
        ("gradient_clip x", "gradient_clip' must be a number, not 'x'."),
        ("compile_blocks maybe", "compile_blocks' must be true or false, not 'maybe'."),
        ("step_counts [1,a]", "step_counts' must be a whole number, not 'a'."),
        ("optimizer.init_args.lr fast", "optimizer.lr' must be a number, not 'fast'."),
        ("lr_decay slow", "lr_decay' must be one of constant, cosine, linear, not 'slow'."),
    ],
)
def test_a_value_of_another_type_is_told_in_words(
    option: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option.split()
    arguments = ["fit", "-c", "digits/pcm_4", f"--model.init_args.{name}", value]
    message = error_of(arguments, capsys)
    assert message.endswith(said)
    assert "class '" not in message


def test_what_a_command_line_cannot_take_away_is_said_to_be_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, key = "guidance/digits/whole", "steering.guidance.init_args.augmentor"
    message = error_of(["fit", "-c", whole, f"--model.init_args.{key}", "null"], capsys)
    assert "augmentor' names a class" in message
    assert "as null into a YAML file" in message
    (tmp_path / "mine.yaml").write_text(
        "model: {init_args: {steering: {guidance: {init_args: {augmentor: null}}}}}"
    )
    with contextlib.suppress(SystemExit):
        run(["fit", "-c", whole, "-c", str(tmp_path / "mine.yaml"), "--print_config"])
    assert "augmentor: null" in capsys.readouterr().out
