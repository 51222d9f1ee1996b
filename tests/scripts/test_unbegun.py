"""Runs that fail before their first update leave no folder, and no other folder is ever taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.main import main
from scripts.unbegun import discarded_unless_begun


def fail_in(run: Path, *files: str, first: bool = True, updates: int = 0) -> None:
    """A run that writes files and fails."""
    trainer: Any = SimpleNamespace(is_global_zero=first, global_step=updates)

    def write_and_fail() -> None:
        for name in files:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text("something")
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"), discarded_unless_begun(trainer, run):
        write_and_fail()


def test_a_student_without_its_teacher_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "-c", "digits/pcm_4", "--trainer.callbacks=[]"]
    for _ in range(2):
        assert main(arguments) == 2
        assert "Train it first" in capsys.readouterr().err
        assert not list(Path("runs/digits/pcm_4").iterdir())
    kept = Path("runs/digits/pcm_4/version_7")
    kept.mkdir()
    assert main([*arguments, "--run.version", "version_7"]) == 2
    assert (kept / "config.yaml").exists()


def test_what_is_written_before_a_run_begins_goes(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    fail_in(run, "config.yaml", "tensorboard/events.out.tfevents.1")
    assert not run.exists()
    fail_in(run)
    assert not run.exists()


@pytest.mark.parametrize(
    "more",
    [
        "metrics.csv",
        "results.json",
        "checkpoints/update_00000001.ckpt",
        "checkpoints/update_00000001.partial",
        "samples/00000000.png",
        "slurm/job.sh",
        "tensorboard/notes.txt",
        "deep/config.yaml",
    ],
)
def test_a_folder_that_holds_anything_else_stays(more: str, tmp_path: Path) -> None:
    fail_in(tmp_path / "version_0", "config.yaml", more)
    assert (tmp_path / "version_0" / more).exists()


def test_a_folder_of_before_another_ranks_or_of_a_run_that_began_stays(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    fail_in(tmp_path / "before", "config.yaml")
    fail_in(tmp_path / "other", "config.yaml", first=False)
    fail_in(tmp_path / "began", "config.yaml", updates=1)
    assert len(list(tmp_path.glob("*/config.yaml"))) == 3


def test_a_run_that_ends_well_stays(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0)
    with discarded_unless_begun(trainer, tmp_path / "run"):
        (tmp_path / "run").mkdir()
    assert (tmp_path / "run").is_dir()
