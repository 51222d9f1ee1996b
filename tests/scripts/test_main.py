"""The front door: its help, and what it says of a command that was interrupted."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from scripts import main as front_door
from scripts.experiments import find_experiment


@pytest.mark.parametrize("command", ["fit", "evaluate", "submit"])
def test_an_experiment_is_named_by_an_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert front_door.main([command, "digits/teacher", "--x", "3"]) == 2
    advice = f"Name an experiment with -c: fewstep {command} -c digits/teacher --x 3"
    assert advice in capsys.readouterr().err
    if command == "fit":
        assert front_door.main([command]) == 2
        assert "Name an experiment: fewstep fit -c" in capsys.readouterr().err


def test_a_shortened_option_is_not_taken_for_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door.main(["fit", "-c", "digits/teacher", "--trainer.max_step", "5"]) == 2
    assert "Did you mean '--trainer.max_steps'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fit", "Stopped. The same command with --ckpt_path last goes on."),
        ("demo", "Stopped. The same command goes on."),
        ("suite", "Stopped. The same command goes on."),
        ("evaluate", "Stopped."),
        ("shards", "Stopped."),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(
    command: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(front_door, "run", interrupted)
    assert front_door.main([command]) == 130
    assert capsys.readouterr().err.strip() == said


def test_a_reader_that_stops_reading_is_no_crash() -> None:
    command = (
        "from scripts.main import main; raise SystemExit(main(['suite', 'digits', '--dry-run']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 141
    assert said.strip() == "Stopped: what read the output has ended."


def test_help_names_an_experiment_that_there_is_and_all_that_gates_can_do() -> None:
    for name in re.findall(r"-c ([\w/]+)", front_door.HELP):
        find_experiment(name)
    (line,) = (line for line in front_door.HELP.splitlines() if line.startswith("  gates"))
    for action in ("apply", "merge", "report", "sensitivity", "grow", "prune"):
        assert action in line


def test_help_of_fit_speaks_of_checkpoints_as_submit_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        front_door.run(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--ckpt_path CKPT_PATH 'last' goes on with the newest run; or a checkpoint file" in said
    assert "hpc" not in said
