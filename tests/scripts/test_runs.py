"""Where a command works and what it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.errors import FewstepError
from scripts.experiments import expand_arguments, find_experiment, short_name, with_defaults
from scripts.runs import place, place_new_run, refuse_disagreement


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


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("num_nodes", "environment", "words"),
    [(2, {}, "on 2 nodes"), (1, TORCHRUN, "on 8 ranks"), (1, SRUN, "on 4 ranks")],
)
def test_several_that_choose_a_new_folder_each_by_itself_are_refused(
    num_nodes: int,
    environment: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FewstepError, match=f"{words}.* --run.version version_7 here"):
        refuse_disagreement(tmp_path / "version_7", num_nodes)
    refuse_disagreement(add_run(tmp_path, "version_7"), num_nodes)


def test_one_process_chooses_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_disagreement(tmp_path / "version_0", 1)
    for name, value in {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    refuse_disagreement(tmp_path / "version_0", 1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # but not by torchrun
    refuse_disagreement(tmp_path / "version_0", 1)


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
    assert expand_arguments(["evaluate", "--steps=4", "--seeds=[0,1]"])[0][1:] == [
        "--steps=[4]",
        "--seeds=[0,1]",
    ]


def test_runs_with_names_of_their_own_are_told_of_and_count_for_nothing(tmp_path: Path) -> None:
    experiment = tmp_path / "teacher"
    with pytest.raises(FewstepError, match=r"no run with a checkpoint\. Train it first.*--run.dir"):
        place(experiment, None, None, training=False)
    add_run(experiment, "version_a")
    assert place_new_run(experiment).name == "version_0"
    add_run(experiment, "version_3")
    assert place_new_run(experiment).name == "version_4"
    named = tmp_path / "student"
    add_run(named, "version_9", checkpoint=False)
    add_run(named, "best")
    with pytest.raises(FewstepError, match=r"But best has one: give --run.version best\."):
        place(named, None, None, training=False)
    assert place(named, "best", None, training=False)[0] == named / "best"
