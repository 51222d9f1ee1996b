"""Which runs are taken together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_runs import LCM, TEACHER, make_run, measured, page_of, plain, rows_of, section


def config(seed: int, **model: Any) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "run": {"version": f"version_{seed}"},
        "model": {"init_args": model},
    }


def test_runs_that_differ_in_their_seed_alone_form_one_row(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        settings = config(seed, num_phases=4)
        numbers = measured({4: [value - 0.5, value + 0.5]})
        version = f"version_{seed}"
        make_run(tmp_path, "digits/pcm", LCM, numbers, version=version, config=settings)
    page = page_of(tmp_path)
    rows = rows_of(page)
    assert list(rows) == ["run", "digits/pcm", "seed 0", "seed 1", "seed 2"]
    assert rows["digits/pcm"] == ["2.00 ± 1.00"], "the spread is that of training runs"
    assert rows["seed 1"] == ["2.00 ± 0.71 2 seeds"]
    assert "3 runs, 1 when those that differ only in their seed are taken together" in plain(page)


def test_another_setting_another_number_of_updates_or_no_config_keep_runs_apart(
    tmp_path: Path,
) -> None:
    make_run(tmp_path, "x", LCM, measured({4: 1.0}), version="v0", config=config(0, phases=4))
    make_run(tmp_path, "x", LCM, measured({4: 1.0}), version="v1", config=config(1, phases=8))
    later = {"version": "v2", "config": config(2, phases=4), "updates": (700,)}
    make_run(tmp_path, "x", LCM, measured({4: 1.0}), **later)  # type: ignore[arg-type]
    make_run(tmp_path, "x", LCM, measured({4: 1.0}), version="v3")
    assert list(rows_of(page_of(tmp_path)))[1:] == ["x · v0", "x · v1", "x · v2", "x · v3"]


def test_the_same_run_twice_does_not_pass_for_two_seeds(tmp_path: Path) -> None:
    for version in ("v0", "v1"):
        settings = config(0, phases=4)
        make_run(tmp_path, "x", LCM, measured({4: 1.0}), version=version, config=settings)
    assert "±" not in section(page_of(tmp_path), "leaderboard")


def test_students_of_teachers_that_differ_in_their_seed_belong_together(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for seed in (0, 1):
        version = f"version_{seed}"
        settings = config(seed, layers=2)
        make_run(root, "teacher", TEACHER, measured({50: 0.2}), version=version, config=settings)
        settings = config(seed, teacher=f"runs/teacher/{version}")
        make_run(root, "lcm", LCM, measured({4: 1.0 + seed}), version=version, config=settings)
    assert rows_of(page_of(tmp_path))["lcm"] == ["1.50 ± 0.71", "–"]


def test_students_of_teachers_that_differ_in_more_stay_apart(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for seed in (0, 1):
        version = f"version_{seed}"
        settings = config(seed, layers=2 + seed)
        make_run(root, "teacher", TEACHER, measured({50: 0.2}), version=version, config=settings)
        settings = config(seed, teacher=f"runs/teacher/{version}")
        make_run(root, "lcm", LCM, measured({4: 1.0 + seed}), version=version, config=settings)
    assert {"lcm · version_0", "lcm · version_1"} <= set(rows_of(page_of(tmp_path)))
