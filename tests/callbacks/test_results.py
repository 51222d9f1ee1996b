"""``results.json``: what is kept beside new measurements, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from callbacks import Evaluation
from callbacks.results import FILE_NAME, Measurement, read_results, write_results
from fewstep.errors import FewstepError
from fewstep.metrics import SlicedWasserstein

from rings import quiet_trainer


class Finished(pl.LightningModule):
    """Stands in for a method, as finished samples do."""

    def __init__(self, contents: str) -> None:
        super().__init__()
        self.contents = contents

    def sample_source(self) -> dict[str, Any]:
        return {"samples": "/there", "files": 3, "contents": self.contents}


def measurement(**changed: Any) -> Measurement:
    values: dict[str, Any] = {
        "metric": "fid",
        "value": 1.0,
        "num_steps": 4,
        "network_evaluations": 4,
        "guidance_scale": 1.0,
        "role": "samples",
        "num_samples": 100,
        "seed": 0,
        "protocol": {},
    }
    return Measurement(**values | changed)


def write(folder: Path, module: pl.LightningModule, *found: Measurement) -> list[dict[str, Any]]:
    trainer = quiet_trainer(folder, [], 1)
    write_results(trainer, module, list(found), {})
    measured: list[dict[str, Any]] = read_results(folder / FILE_NAME)["measurements"]
    return measured


def loaded_from(trainer: pl.Trainer, checkpoint: Path, updates: int) -> pl.LightningModule:
    """A module as `fewstep evaluate` leaves it, whose checkpoint has had so many updates."""
    trainer.state.fn = "validate"  # type: ignore[assignment]
    trainer._checkpoint_connector._ckpt_path = str(checkpoint)
    module = pl.LightningModule()
    module.loaded_metadata = {"student_updates": updates}  # type: ignore[assignment]
    return module


def test_guidance_scales_are_kept_side_by_side(tmp_path: Path) -> None:
    module = Finished("a")
    write(tmp_path, module, measurement(guidance_scale=1.0, value=1.0))
    found = write(tmp_path, module, measurement(guidance_scale=7.5, value=2.0))
    assert {m["guidance_scale"]: m["value"] for m in found} == {1.0: 1.0, 7.5: 2.0}
    found = write(tmp_path, module, measurement(guidance_scale=7.5, value=3.0))
    assert {m["guidance_scale"]: m["value"] for m in found} == {1.0: 1.0, 7.5: 3.0}


def test_other_samples_of_the_same_name_are_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path, Finished("a"), measurement(num_steps=1))
    assert len(write(tmp_path, Finished("a"), measurement(num_steps=2))) == 2
    (only,) = write(tmp_path, Finished("b"), measurement(num_steps=4))
    assert only["num_steps"] == 4
    source = read_results(tmp_path / FILE_NAME)["source"]
    assert source == {"samples": "/there", "files": 3, "contents": "b"}


def test_samples_are_not_mixed_with_results_that_do_not_say_of_which(tmp_path: Path) -> None:
    write(tmp_path, Finished("a"), measurement(num_steps=1))
    content = json.loads((tmp_path / FILE_NAME).read_text())
    del content["source"]
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    assert len(write(tmp_path, Finished("a"), measurement(num_steps=2))) == 1


@pytest.mark.parametrize("sourced", [True, False])
def test_results_of_training_and_of_its_checkpoint_are_kept_together(
    tmp_path: Path, sourced: bool
) -> None:
    """They have the same weights; files of older versions do not say of which they are."""
    trainer = quiet_trainer(tmp_path, [], 1)
    trainer.state.fn = "fit"
    write_results(trainer, pl.LightningModule(), [measurement(num_steps=1)], {})
    content = json.loads((tmp_path / FILE_NAME).read_text())
    assert content.pop("source") == {"student_updates": 0}
    if not sourced:
        (tmp_path / FILE_NAME).write_text(json.dumps(content))
    own = loaded_from(trainer, tmp_path / "checkpoints" / "last.ckpt", 0)
    write_results(trainer, own, [measurement(num_steps=2)], {})
    assert len(read_results(tmp_path / FILE_NAME)["measurements"]) == 2


def test_a_checkpoint_of_another_run_does_not_join_this_ones_results(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path / "run", [], 1)
    for checkpoint, steps in ((tmp_path / "run" / "a.ckpt", 1), (tmp_path / "b.ckpt", 2)):
        module = loaded_from(trainer, checkpoint, 10)
        write_results(trainer, module, [measurement(num_steps=steps)], {})
    content = read_results(tmp_path / "run" / FILE_NAME)
    assert [m["num_steps"] for m in content["measurements"]] == [2]
    assert content["source"]["checkpoint"] == str((tmp_path / "b.ckpt").resolve())


@pytest.mark.parametrize("change", [{"novel": 1}, {"value": None}])
def test_measurements_of_another_version_are_refused_with_the_remedy(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    write(tmp_path, Finished("a"), measurement())
    content = json.loads((tmp_path / FILE_NAME).read_text())
    entry = content["measurements"][0]
    entry.update(change)
    if change == {"value": None}:
        del entry["value"]
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(FewstepError, match=r"Delete it and run\s`fewstep evaluate` again"):
        write(tmp_path, Finished("a"), measurement(num_steps=1))


def test_two_metrics_whose_values_have_one_name_are_refused() -> None:
    with pytest.raises(FewstepError, match=r"both give values called 'sliced_wasserstein'"):
        Evaluation([SlicedWasserstein(), SlicedWasserstein()])
    named = SimpleNamespace(better={"another": "lower"})
    Evaluation([SlicedWasserstein(), named])  # type: ignore[list-item]
