"""Where a command works and what it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.errors import FewstepError
from scripts.experiments import expand_arguments, find_experiment, short_name, with_defaults
from scripts.runs import place


def add_run(experiment: Path, version: str, checkpoint: bool = True) -> Path:
    folder = experiment / version / "checkpoints"
    folder.mkdir(parents=True)
    if checkpoint:
        (folder / "last.ckpt").touch()
    return folder.parent


def test_training_from_the_start_takes_a_new_folder(tmp_path: Path) -> None:
    assert place(tmp_path, None, None, training=True) == (tmp_path / "version_0", None)
    add_run(tmp_path, "version_9")
    add_run(tmp_path, "version_10")
    assert place(tmp_path, None, None, training=True) == (tmp_path / "version_11", None)


def test_last_goes_on_with_the_newest_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    run = add_run(tmp_path, "version_0")
    add_run(tmp_path, "version_1", checkpoint=False)
    last = run / "checkpoints" / "last.ckpt"
    assert place(tmp_path, None, "last", training=True) == (run, last)


def test_last_begins_anew_where_there_is_nothing(tmp_path: Path) -> None:
    assert place(tmp_path, "version_3", "last", training=True) == (tmp_path / "version_3", None)


def test_a_checkpoint_of_this_experiment_is_continued_in_its_own_folder(tmp_path: Path) -> None:
    run = add_run(tmp_path, "version_0")
    last = run / "checkpoints" / "last.ckpt"
    assert place(tmp_path, None, str(last), training=True) == (run, last)
    assert place(tmp_path, None, str(run), training=False) == (run, last)


def test_a_checkpoint_from_elsewhere_starts_a_new_run(tmp_path: Path) -> None:
    run = add_run(tmp_path / "other", "version_0")
    last = run / "checkpoints" / "last.ckpt"
    here = tmp_path / "mine"
    assert place(here, None, str(last), training=True) == (here / "version_0", last)


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="There is no checkpoint"):
        place(tmp_path, None, str(tmp_path / "no.ckpt"), training=True)


def test_experiments_are_found_by_short_name_and_bring_their_defaults() -> None:
    path = find_experiment("digits/teacher")
    assert short_name(path) == "digits/teacher"
    assert [short_name(p) for p in with_defaults(path)] == [
        "defaults",
        "digits/defaults",
        "digits/teacher",
    ]


def test_lists_on_the_command_line_need_no_brackets() -> None:
    arguments, name = expand_arguments(
        ["evaluate", "-c", "digits/teacher", "--steps", "1", "2", "--roles", "ema", "--x", "3"]
    )
    assert name == "digits/teacher"
    assert arguments[-4:] == ["--steps=[1,2]", "--roles=[ema]", "--x", "3"]
