"""The tables of numbers: who is where, what is best and what must not be compared."""

from __future__ import annotations

import math
import re
from pathlib import Path

from report_runs import LCM, PROTOCOL, make_run, measured, page_of, rows_of, section


def test_leaderboard_has_teachers_first_and_a_dash_where_nothing_was_measured(demo: Path) -> None:
    rows = rows_of(page_of(demo))
    assert list(rows) == ["run", "digits/teacher", "digits/lcm", "digits/pcm_4"]
    assert rows["run"] == ["1 step", "4 steps", "50 steps"]
    assert rows["digits/teacher"] == ["–", "1.80", "0.300"]
    assert rows["digits/pcm_4"] == ["–", "0.315", "–"]


def test_only_the_best_of_comparable_values_is_bold(demo: Path) -> None:
    strong = re.findall(r"<strong>(.*?)</strong>", page_of(demo))
    assert strong == ["0.315"], "the columns with a single value have no winner"


def test_seeds_are_averaged_with_their_standard_deviation(tmp_path: Path) -> None:
    make_run(tmp_path, "digits/lcm", LCM, measured({4: [1.0, 2.0, 3.0]}))
    assert rows_of(page_of(tmp_path))["digits/lcm"] == ["2.00 ± 1.00 3 seeds"]


def test_evaluations_are_shown_where_guidance_makes_them_differ_from_steps(demo: Path) -> None:
    make_run(demo, "digits/guided", LCM, measured({4: 0.5}, guidance=2))
    rows = rows_of(page_of(demo))
    assert rows["digits/guided"][1] == "0.500 8 evaluations"
    assert rows["digits/lcm"][1] == "0.630"


def test_numbers_of_another_protocol_are_flagged_and_never_win(demo: Path) -> None:
    other = {**PROTOCOL, "features": {"name": "digit_classifier", "weights_sha256": "beef"}}
    odd = measured({4: 0.01}, num_samples=64, protocol=other)
    make_run(demo, "digits/odd", LCM, odd)
    page = page_of(demo)
    assert "digits/odd a" in rows_of(page)
    text = section(page, "leaderboard")
    assert 'features.weights_sha256 is "beef", not "0fdc"; num_samples is 64, not 2048.' in text
    assert "<strong>0.0100</strong>" not in page
    assert "digits/odd is not set beside a teacher" in section(page, "findings")


def test_two_protocols_within_a_run_are_not_averaged(tmp_path: Path) -> None:
    numbers = measured({4: 1.0}) + measured({1: 9.0, 4: 3.0}, num_samples=64)
    make_run(tmp_path, "digits/lcm", LCM, numbers)
    assert {"digits/lcm", "digits/lcm a"} <= set(rows_of(page_of(tmp_path)))


def test_values_that_are_not_finite_are_said_to_be_so(demo: Path) -> None:
    make_run(demo, "digits/broken", LCM, measured({4: math.nan}))
    page = page_of(demo)
    assert rows_of(page)["digits/broken"][1] == "not finite"
    assert "<strong>0.315</strong>" in page


def test_versions_are_named_only_where_an_experiment_has_several(demo: Path) -> None:
    make_run(demo, "digits/lcm", LCM, measured({4: 0.7}), version="version_10")
    make_run(demo, "digits/lcm", LCM, measured({4: 0.7}), version="version_2")
    labels = [label for label in rows_of(page_of(demo)) if label != "run"]
    assert labels == [
        "digits/teacher",
        "digits/lcm · version_0",
        "digits/lcm · version_2",
        "digits/lcm · version_10",
        "digits/pcm_4",
    ]


def test_where_more_is_better_the_largest_value_wins(tmp_path: Path) -> None:
    for name, value in (("a", 0.4), ("b", 0.7)):
        numbers = measured({4: value}, metric="precision", better="higher")
        make_run(tmp_path, name, LCM, numbers)
    page = page_of(tmp_path)
    assert re.findall(r"<strong>(.*?)</strong>", page) == ["0.700"]
    assert 'data-better="higher"' in page
    assert "precision higher is better" in section(page, "leaderboard")


def test_the_metrics_that_matter_most_come_first(tmp_path: Path) -> None:
    metrics = ("recall", "kid", "some_other", "frechet_x", "fvd", "fid")
    numbers = [m for metric in metrics for m in measured({4: 1.0}, metric=metric)]
    make_run(tmp_path, "a", LCM, numbers)
    options = re.findall(r"<option[^>]*>(\w+)</option>", page_of(tmp_path).split("</select>")[0])
    assert options == ["fid", "fvd", "frechet_x", "kid", "recall", "some_other"]


def test_all_metrics_stand_side_by_side_at_a_step_count(tmp_path: Path) -> None:
    for name, fid, recall in (("a", 3.0, 0.4), ("b", 4.0, 0.7)):
        numbers = measured({4: fid}, metric="fid")
        numbers += measured({4: recall}, metric="recall", better="higher")
        make_run(tmp_path, name, LCM, numbers)
    text = section(page_of(tmp_path), "overview")
    assert f"run fid recall a ema, {LCM} 3.00 0.400 b ema, {LCM} 4.00 0.700" in text
