"""The metrics file."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.loggers import MetricsCSV, read_metrics


def test_curves_come_back_and_survive_a_resumption(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(4):
        logger.log_metrics({"train/loss": torch.tensor(1.0 / (step + 1))}, step)
    resumed = MetricsCSV(tmp_path)
    resumed.log_metrics({"train/loss": 0.5, "eval/x": 2}, 2)
    curves = read_metrics(tmp_path)
    assert curves["train/loss"] == [(0, 1.0), (1, 0.5), (2, 0.5), (3, 0.25)]
    assert curves["eval/x"] == [(2, 2.0)]


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"a": 1.0}, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,123.0,a")
    assert read_metrics(tmp_path) == {"a": [(1, 1.0)]}


def test_no_file_means_no_curves(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {}
