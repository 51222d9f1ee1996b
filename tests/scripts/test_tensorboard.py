"""What TensorBoard is told of a run, read back as TensorBoard reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import plugin_data_pb2

from scripts.main import main
from scripts.tensorboard import TensorBoard, chart_layout, shown_settings

SETTINGS = {"seed_everything": 3, "model.lr": 1e-3, "model.teacher": None, "trainer.devices": 8}
VALUES = {"eval/fid/ema/4_steps": 2.0, "eval/fid/ema/1_steps": 9.0, "eval/seconds": 7.0}


def events_of(run: Path) -> EventAccumulator:
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    read.Reload()
    return read


def hparams_of(read: EventAccumulator, tag: str) -> Any:
    content = read.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    logger = TensorBoard(tmp_path)
    logger.log_hyperparams(SETTINGS)
    logger.log_metrics({"train/loss": 1.0}, 1)
    for step, factor in ((10, 2.0), (20, 1.0)):
        logger.log_metrics({name: factor * value for name, value in VALUES.items()}, step)
    logger.finalize("success")
    return tmp_path


def test_settings_stand_beside_the_metrics_in_the_runs_own_file(run: Path) -> None:
    assert [path.is_dir() for path in (run / "tensorboard").iterdir()].count(True) == 0
    read = events_of(run)
    started = hparams_of(read, "session_start_info").session_start_info
    shown = {k: v.number_value or v.string_value for k, v in started.hparams.items()}
    assert shown == {"seed_everything": 3, "model.lr": 1e-3}
    metrics = hparams_of(read, "experiment").experiment.metric_infos
    names = [info.name.tag for info in metrics]
    assert names == ["eval/fid/ema/1_steps", "eval/fid/ema/4_steps"]
    # The metrics' values are those of the scalars with these names, the last of which counts.
    assert [read.Scalars(name)[-1].value for name in names] == [9.0, 2.0]
    assert read.Tags()["scalars"].count("hp_metric") == 0
    status = hparams_of(read, "session_end_info").session_end_info.status
    assert status == plugin_data_pb2.__dict__.get("STATUS_SUCCESS", 1)


def test_a_layout_compares_step_counts_and_is_written_once(run: Path) -> None:
    read = events_of(run)
    (event,) = read.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "fid"
    matched = {
        chart.title: [n for n in sorted(VALUES) if re.match(chart.multiline.tag[0], n)]
        for chart in category.chart
    }
    assert matched == {
        "all step counts": ["eval/fid/ema/1_steps", "eval/fid/ema/4_steps"],
        "1 step": ["eval/fid/ema/1_steps"],
        "4 steps": ["eval/fid/ema/4_steps"],
    }


def test_a_run_without_evaluation_still_shows_its_settings(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path)
    logger.log_hyperparams(SETTINGS)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.finalize("success")
    metrics = hparams_of(events_of(tmp_path), "experiment").experiment.metric_infos
    assert [info.name.tag for info in metrics] == ["train/loss"]


def test_settings_become_values_that_tensorboard_takes() -> None:
    assert shown_settings({"model.sizes": [1, 2], "model.on": True, "run.dir": "runs"}) == {
        "model.sizes": "[1, 2]",
        "model.on": True,
    }


def test_step_counts_are_ordered_as_numbers() -> None:
    names = [f"eval/kid/ema/{n}_steps" for n in (16, 2, 8)]
    assert list(chart_layout(names)["kid"])[1:] == ["2 steps", "8 steps", "16 steps"]


@pytest.mark.slow
def test_training_tells_tensorboard_the_settings_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", "analytic/lcm", *arguments]) == 0
    read = events_of(tmp_path / "runs/analytic/lcm/version_0")
    started = hparams_of(read, "session_start_info").session_start_info
    assert started.hparams["trainer.max_steps"].number_value == 2
    assert started.hparams["model.class_path"].string_value.endswith("ConsistencyDistillation")
    assert [name for name in read.Tags()["images"] if name.startswith("samples/")]


@pytest.mark.parametrize(
    ("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")]
)
def test_a_logger_whose_package_is_missing_says_how_to_install_it(
    logger: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scripts.cli.find_spec", lambda name: None)
    arguments = ["--trainer.logger", f"lightning.pytorch.loggers.{logger}"]
    assert main(["fit", "-c", "analytic/lcm", *arguments]) == 2
    assert f"pip install 'fewstep[{package}]'" in capsys.readouterr().err
