"""What the page says of the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from report_runs import LCM, PCM, TEACHER, make_run, measured, page_of, section


def test_students_are_set_beside_the_teacher_at_its_most_steps(demo: Path) -> None:
    text = section(page_of(demo), "findings")
    assert (
        "worse digits/pcm_4 at 4 steps: 1.05x the teacher at 50 steps, worse (0.315 against 0.300; "
        "12.5x fewer network evaluations)."
    ) in text
    assert "worse digits/lcm at 1 step: 13.33x the teacher at 50 steps" in text


@pytest.mark.parametrize(("value", "said"), [(0.315, "0.50x"), (1.26, "2.00x")])
def test_pcm_is_set_beside_lcm_at_equal_steps_whichever_wins(
    tmp_path: Path, value: float, said: str
) -> None:
    make_run(tmp_path, "digits/lcm", LCM, measured({1: 4.0, 4: 0.63}))
    make_run(tmp_path, "digits/pcm_4", PCM, measured({4: value}))
    text = section(page_of(tmp_path), "findings")
    verdict = "better" if value < 0.63 else "worse"
    assert (
        f"{verdict} PCM (digits/pcm_4) at 4 steps: {said} LCM (digits/lcm) at equal steps, "
        f"{verdict} ({value:#.3g} against 0.630)."
    ) in text
    assert "No teacher is among these runs" in text


def test_a_student_goes_with_the_teacher_its_configuration_names(demo: Path) -> None:
    make_run(demo, "digits/better", TEACHER, measured({50: 0.1}))
    config = {"model": {"init_args": {"teacher": "../runs/digits/teacher"}}}
    home = demo / "runs"
    make_run(home, "digits/teacher", TEACHER, measured({50: 0.2}), version="version_7")
    make_run(home, "digits/own", LCM, measured({4: 0.4}), config=config)
    text = section(page_of(demo), "findings")
    assert "digits/own at 4 steps: 2.00x the teacher digits/teacher · version_7 at 50 steps" in text


def test_differences_within_the_spread_of_seeds_are_called_that(tmp_path: Path) -> None:
    make_run(tmp_path, "digits/lcm", LCM, measured({4: [1.0, 1.4]}))
    make_run(tmp_path, "digits/pcm", PCM, measured({4: [1.1, 1.6]}))
    text = section(page_of(tmp_path), "findings")
    assert "worse on average, but within the spread over seeds" in text


def test_a_larger_value_is_a_better_one_where_the_metric_says_so(tmp_path: Path) -> None:
    for name, method, value in (("t", TEACHER, 0.5), ("s", LCM, 0.6)):
        make_run(tmp_path, name, method, measured({4: value}, metric="recall", better="higher"))
    text = section(page_of(tmp_path), "findings")
    assert "better s at 4 steps: 1.20x the teacher at 4 steps, better (0.600 against 0.500)" in text
