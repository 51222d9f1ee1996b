"""The data that charts are drawn from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from scripts.report.charts import Axis, Chart, Series, downsample, running_mean, usable

from report_runs import LCM, data_of, make_run, measured, page_of


def test_curves_are_drawn_smoothed_over_the_raw_line(demo: Path) -> None:
    charts = data_of(page_of(demo))["charts"]
    (chart,) = [chart for chart in charts if chart["name"] == "train/loss"]
    assert [s["group"] for s in chart["series"]] == [0, 1, 2]
    for s in chart["series"]:
        raw = s["faint"][1]
        assert len(raw) == 40
        assert max(s["y"]) - min(s["y"]) < max(raw) - min(raw)
    assert not [chart for chart in charts if "epoch" in chart["name"]]


def test_many_runs_have_thinner_curves_without_raw_lines(tmp_path: Path) -> None:
    for i in range(40):
        make_run(tmp_path, f"r{i}", LCM, measured({4: 1.0}), curves=0, pictures=False)
        rows = "".join(f"{n},0,train/loss,{n % 7}\n" for n in range(900))
        (tmp_path / f"r{i}" / "version_0" / "metrics.csv").write_text(rows)
    charts = data_of(page_of(tmp_path))["charts"]
    (chart,) = [chart for chart in charts if chart["name"] == "train/loss"]
    assert len(chart["series"]) == 40
    assert all(len(s["x"]) <= 300 and "faint" not in s for s in chart["series"])


def test_quality_charts_have_a_line_for_each_row(demo: Path) -> None:
    sampling, training, *_ = data_of(page_of(demo))["charts"]
    hints = {s["name"]: s["hints"] for s in sampling["series"]}
    assert hints["digits/pcm_4"] == ["4 steps: 0.315"]
    assert {s["name"]: s["labels"] for s in training["series"]}["digits/teacher"] == ["4", "50"]


def test_spreads_over_seeds_become_error_bars(tmp_path: Path) -> None:
    make_run(tmp_path, "a", LCM, measured({1: [1.0, 2.0, 3.0], 4: 0.5}))
    (series,) = data_of(page_of(tmp_path))["charts"][0]["series"]
    assert series["errors"] == [1.0, 0.0]
    assert series["hints"] == ["1 step: 2.00 ± 1.00", "4 steps: 0.500"]


def test_thinning_a_curve_keeps_its_spikes() -> None:
    points = [(i, 1.0) for i in range(10_000)]
    points[5003] = (5003, 99.0)
    thin = downsample(points)
    assert len(thin) <= 400
    assert (5003, 99.0) in thin
    assert thin == sorted(thin)


def test_running_mean_leaves_a_straight_line_alone() -> None:
    smooth = running_mean([(i, 3.0 * i + 1) for i in range(200)])
    assert len(smooth) > 180
    assert [v for _, v in smooth] == pytest.approx([3.0 * i + 1 for i, _ in smooth])


def test_charts_stand_values_a_logarithm_cannot_take() -> None:
    x, y = Axis("x", log=True), Axis("y", log=True)
    points = usable([(1, 0.0), (2, math.nan), (4, 2.0)], x, y)
    assert points == [(4, 2.0)]
    assert Chart("nothing", x, y, [Series(0, "a", [])]).empty
