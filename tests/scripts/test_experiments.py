"""Finding experiments, in the working directory and among those shipped, with their defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fewstep.errors import FewstepError
from scripts.experiments import (
    expand_arguments,
    experiments_roots,
    find_experiment,
    known_experiments,
    with_defaults,
)
from scripts.slurm.submit import CheckedExperiment

SHIPPED = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str = "{}") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def places(files: list[Path]) -> list[Path]:
    return [file.resolve() for file in files]


def test_experiments_of_ones_own_do_not_hide_those_shipped(here: Path) -> None:
    write("experiments/mine/lcm.yaml")
    write("experiments/digits/pcm_4.yaml")
    assert experiments_roots() == [Path("experiments"), SHIPPED]
    assert {"mine/lcm", "digits/pcm_4", "digits/teacher"} < set(known_experiments())
    assert len(known_experiments()) == len(set(known_experiments()))
    assert find_experiment("mine/lcm") == Path("experiments/mine/lcm.yaml")
    assert find_experiment("digits/pcm_4") == Path("experiments/digits/pcm_4.yaml")
    assert find_experiment("digits/teacher") == SHIPPED / "digits" / "teacher.yaml"
    assert find_experiment("experiments/digits/teacher.yaml") == SHIPPED / "digits/teacher.yaml"


def test_each_experiment_has_the_defaults_of_its_own_folders(here: Path) -> None:
    own = write("experiments/mine/lcm.yaml").resolve()
    shipped = SHIPPED / "digits" / "teacher.yaml"
    assert places(with_defaults(own)) == [SHIPPED / "defaults.yaml", own]
    folder = write("experiments/mine/defaults.yaml").resolve()
    assert places(with_defaults(own)) == [SHIPPED / "defaults.yaml", folder, own]
    root = write("experiments/defaults.yaml").resolve()
    assert places(with_defaults(own)) == [root, folder, own]
    theirs = [SHIPPED / "defaults.yaml", SHIPPED / "digits" / "defaults.yaml", shipped]
    assert places(with_defaults(shipped)) == theirs


def test_a_file_in_any_folder_has_the_shipped_defaults_and_a_runs_own_file_none(
    here: Path,
) -> None:
    file = write("elsewhere/mine.yaml")
    assert places(with_defaults(file)) == [SHIPPED / "defaults.yaml", file.resolve()]
    config = write("runs/x/version_0/config.yaml")
    assert with_defaults(config) == [config]


def test_a_file_of_overrides_does_not_bring_the_defaults_back(here: Path) -> None:
    write("digits.yaml", "trainer: {log_every_n_steps: 7}")
    write("more.yaml", "trainer: {max_steps: 3}")
    arguments = ["fit", "-c", "digits/lcm", "-c", "digits.yaml", "-c", "more.yaml"]
    config = CheckedExperiment(arguments).config.fit
    assert (config.trainer.log_every_n_steps, config.trainer.max_steps) == (7, 3)
    assert config.trainer.val_check_interval == 250
    alone = [name for name in expand_arguments(["fit", "-c", "more.yaml"])[0] if "yaml" in name]
    assert places([Path(name) for name in alone]) == [SHIPPED / "defaults.yaml", here / "more.yaml"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("digits/techer", "Did you mean 'digits/teacher'? In digits/ there are: digits/apt, "),
        ("digits", "There is no experiment 'digits'. In digits/ there are: digits/apt, "),
        ("guidance/x", "Folders of experiments: guidance/analytic, guidance/celebahq, "),
        ("zzz/zzz", "There is no experiment 'zzz/zzz'. Folders of experiments: analytic, "),
    ],
)
def test_an_experiment_that_there_is_not_is_told_with_its_neighbours_alone(
    asked: str, said: str, here: Path
) -> None:
    with pytest.raises(FewstepError) as refused:
        find_experiment(asked)
    assert said in str(refused.value)
    assert ("wan" in str(refused.value)) == asked.startswith("z")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer:\n  max_steps: [1\nx: 2\n", "broken.yaml, line 3, column 2: expected ',' or"),
        ("trainer:\n\tmax_steps: 1\n", "broken.yaml, line 2, column 1: found character"),
        ("just words", "'broken.yaml' is no experiment: it has no keys"),
    ],
)
def test_the_file_that_is_no_yaml_is_named_among_several(text: str, said: str, here: Path) -> None:
    write("broken.yaml", text)
    write("fine.yaml", yaml.safe_dump({"trainer": {"max_steps": 1}}))
    with pytest.raises(FewstepError) as refused:
        expand_arguments(["fit", "-c", "digits/pcm_4", "-c", "broken.yaml", "-c", "fine.yaml"])
    assert str(refused.value).startswith(said)
