"""Options of single callbacks on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import FewstepError
from scripts.callback_options import extended, set_callbacks
from scripts.slurm.submit import CheckedExperiment

NUM_SAMPLES = "--trainer.callbacks.Evaluation.num_samples"


def callbacks(command: str, *arguments: str) -> dict[str, Any]:
    """Each callback's options as ``fewstep COMMAND -c digits/pcm_4 ...`` would have them."""
    found = CheckedExperiment([command, "-c", "digits/pcm_4", *arguments])
    listed = found.config[command].trainer.callbacks
    return {one.class_path.rpartition(".")[2]: one.init_args for one in listed}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_a_callback_is_named_by_its_class_wherever_it_stands(command: str) -> None:
    asked = [NUM_SAMPLES, "64", "--trainer.callbacks.Evaluation.max_share=1e-4"]
    found = callbacks(command, *asked, "--trainer.callbacks.Checkpoints.keep", "null")
    before = callbacks(command)
    assert (found["Evaluation"].num_samples, before["Evaluation"].num_samples) == (64, 2048)
    assert found["Evaluation"].max_share == 1e-4
    assert (found["Checkpoints"].keep, before["Checkpoints"].keep) == (None, 2)
    assert found["Evaluation"].every_n_updates == before["Evaluation"].every_n_updates == 250
    assert list(found) == list(before)


def test_it_holds_for_the_list_that_is_used_and_the_last_callback_keeps_its_way() -> None:
    Path("few.yaml").write_text(
        "trainer: {callbacks: [{class_path: callbacks.Samples}, callbacks.Throughput]}"
    )
    asked = ["--trainer.callbacks.Samples.count", "3", "--trainer.callbacks.every_n_updates", "9"]
    found = callbacks("fit", *asked, "-c", "few.yaml")
    assert list(found) == ["Samples", "Throughput"]
    assert found["Samples"].count == 3
    found = callbacks("fit", "-c", "few.yaml", *asked)
    assert (found["Samples"].count, found["Throughput"].every_n_updates) == (3, 9)
    listed = '--trainer.callbacks=[{"class_path": "callbacks.Samples"}]'
    assert callbacks("fit", *asked[:2], listed)["Samples"].count == 3


def test_what_is_added_of_a_kind_that_is_there_sets_that_ones_options() -> None:
    """Of two that save, the one that keeps less would delete what the other keeps."""
    Path("more.yaml").write_text(
        "trainer: {callbacks+: [{class_path: callbacks.Checkpoints, init_args: {keep: 8}}, "
        "callbacks.Alarms]}"
    )
    twice = [{"class_path": "a.Samples"}, {"class_path": "b.Samples"}, {"class_path": "a.Samples"}]
    assert extended(twice, ["c.Alarms"]) == [*twice, {"class_path": "c.Alarms"}]
    before, found = callbacks("fit"), callbacks("fit", "-c", "more.yaml")
    assert list(found) == [*before, "Alarms"]
    assert found["Checkpoints"].keep == 8
    assert found["Checkpoints"].every_n_updates == before["Checkpoints"].every_n_updates != 1000
    asked = ["--trainer.callbacks.Alarms.patience", "3", "--trainer.callbacks.Checkpoints.keep=9"]
    found = callbacks("fit", "-c", "more.yaml", *asked)
    assert (found["Alarms"].patience, found["Checkpoints"].keep) == (3, 9)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("Evaluatio.num_samples=3", "Did you mean 'Evaluation'? It has: Evaluation, Samples, "),
        ("Evaluation=3", r"sets no callback of this experiment.*write trainer.callbacks.Evaluatio"),
        (
            "evaluation.num_samples=3",
            "Did you mean '--trainer.callbacks.Evaluation.num_samples=3'?",
        ),
        ("Evaluation.num_sample=3", "Did you mean 'num_samples'?"),
        ("Evaluation.num_samples=few", "num_samples' must be a whole number, not 'few'."),
        ("Evaluation.num_samples", "--trainer.callbacks.Evaluation.num_samples lacks its value."),
    ],
)
def test_what_no_callback_has_is_one_clear_error(option: str, said: str) -> None:
    with pytest.raises(FewstepError, match=said.replace("?", r"\?")) as refused:
        callbacks("fit", f"--trainer.callbacks.{option}")
    assert len(str(refused.value).splitlines()) == 1


def test_other_arguments_stay_as_they_are() -> None:
    arguments = ["fit", "--config", "a.yaml", "--trainer.callbacks.num_samples", "3", "--config"]
    contents = {"a.yaml": {"trainer": {"callbacks": [{"class_path": "callbacks.Samples"}]}}}
    assert set_callbacks(arguments, contents) == arguments
