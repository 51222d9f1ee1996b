"""The page a user reads: its numbers, its warnings and what it says when pieces are missing."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks.samples import save_picture
from fewstep.errors import FewstepError
from scripts.loggers import MetricsCSV
from scripts.main import main as front_door
from scripts.report import build_report, main
from scripts.report.charts import Axis, Series, line_chart, usable
from scripts.report.plots import downsample, running_mean

METRIC = "frechet_digit_classifier"
TEACHER, LCM, PCM = "DiffusionTraining", "ConsistencyDistillation", "PhasedConsistencyDistillation"
PROTOCOL = {"metric": METRIC, "features": {"name": "digit_classifier", "weights_sha256": "0fdc"}}
TRAINING = {
    "seconds": 20.0,
    "devices": 2,
    "device_hours": 0.0125,
    "samples": 64000,
    "forward_equivalents_per_sample": 5,
}


def measured(
    values: dict[int, float | list[float]], role: str = "ema", guidance: int = 1, **changes: Any
) -> list[dict[str, Any]]:
    """Measurements by step count; a list of values is one a seed."""
    return [
        {
            "metric": METRIC,
            "value": value,
            "num_steps": steps,
            "network_evaluations": guidance * steps,
            "guidance_scale": 1.0,
            "role": role,
            "num_samples": 2048,
            "seed": seed,
            "protocol": PROTOCOL,
        }
        | changes
        for steps, given in values.items()
        for seed, value in enumerate(given if isinstance(given, list) else [given])
    ]


def make_run(
    root: Path,
    name: str,
    method: str,
    measurements: list[dict[str, Any]],
    *,
    version: str = "version_0",
    curves: int = 40,
    pictures: bool = True,
    config: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> Path:
    """A run's folder as training leaves it."""
    folder = root / name.replace("<", "").replace(">", "") / version
    folder.mkdir(parents=True)
    content = {
        "format": 1,
        "run": name,
        "version": version,
        "method": method,
        "student_updates": 600,
        "training": TRAINING if training is None else training,
        "environment": {"torch": "2.14.1", "device": "cpu"},
        "measurements": measurements,
    }
    (folder / "results.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in range(curves):
        loss = math.exp(-step / 20) + 0.05 * (step % 3)
        MetricsCSV(folder).log_metrics({"train/loss": loss, "epoch": 0}, step)
    if pictures:
        for m in measurements:
            image = torch.randint(0, 255, (3, 37, 91), dtype=torch.uint8)
            name = f"{m['role']}_{m['num_steps']}_steps"
            save_picture(image, folder / "samples" / f"{600:08d}_{name}.png")
    return folder


def page_of(root: Path, **options: Any) -> str:
    """The report of everything below a folder."""
    return build_report([root], root / "report.html", **options).read_text(encoding="utf-8")


def rows_of(page: str) -> dict[str, list[str]]:
    """The leaderboard's rows as plain text cells, by their label."""
    table = page.split('id="leaderboard"')[1].split("</table>", maxsplit=1)[0]
    found = {}
    for row in re.findall(r"<tr.*?</tr>", table):
        head, *cells = re.findall(r"<t[hd].*?</t[hd]>", row)
        found[plain(head.split("<small>")[0])] = [plain(cell) for cell in cells]
    return found


def plain(html: str) -> str:
    """Text without tags."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def section(page: str, anchor: str) -> str:
    """The text of one section."""
    return plain(page.split(f'<section id="{anchor}">')[1].split("</section>", maxsplit=1)[0])


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A teacher, an LCM student and a PCM student that is a little worse than the teacher."""
    make_run(tmp_path, "digits/lcm", LCM, measured({1: 4.0, 4: 0.63}))
    make_run(tmp_path, "digits/pcm_4", PCM, measured({4: 0.315}))
    make_run(tmp_path, "digits/teacher", TEACHER, measured({4: 1.8, 50: 0.3}))
    return tmp_path


# ---------------------------------------------------------------------- leaderboard


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


# ---------------------------------------------------------------------- findings


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


# ---------------------------------------------------------------------- charts, curves, pictures


def test_curves_are_drawn_smoothed_over_the_raw_line(demo: Path) -> None:
    page = page_of(demo)
    curves = page.split('<section id="curves">')[1].split("</section>")[0]
    chart = re.search(r'<svg[^>]*aria-label="train/loss".*?</svg>', curves)
    assert chart is not None
    assert len(re.findall(r'class="line s\d"', chart[0])) == 3
    assert len(re.findall(r'class="raw s\d"', chart[0])) == 3
    assert "epoch" not in curves


def test_quality_charts_have_a_line_for_each_row(demo: Path) -> None:
    quality = page_of(demo).split('<section id="quality">')[1].split("</section>")[0]
    sampling, training = re.findall(r"<svg viewBox=\"0 0 430.*?</svg>", quality)
    assert "digits/pcm_4, 4 steps: 0.315" in sampling
    assert "digits/teacher, 50 steps: 0.300" in training


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
    assert "nan" not in line_chart([Series(0, points)], x, y, "one point")
    assert line_chart([Series(0, [])], x, y, "nothing") == ""


def test_pictures_are_inside_the_page_with_their_numbers(demo: Path) -> None:
    page = page_of(demo)
    assert page.count('src="data:image/png;base64,') == 5
    assert f"digits/pcm_4 ema, 4 steps · {METRIC} 0.315" in section(page, "samples")
    assert "same noise" in section(page, "samples")


def test_the_page_needs_nothing_from_elsewhere(demo: Path) -> None:
    page = page_of(demo)
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "@import" not in page
    assert "url(" not in page


# ---------------------------------------------------------------------- cost and small print


def test_cost_table_computes_rates_and_leaves_dashes(tmp_path: Path) -> None:
    make_run(tmp_path, "digits/lcm", LCM, measured({4: 1.0}))
    make_run(tmp_path, "digits/pcm", PCM, measured({4: 1.0}), training={"samples": 64000})
    text = section(page_of(tmp_path), "cost")
    assert f"digits/lcm {LCM} 600 64 000 20 2 0.0125 3 200 5 320 000" in text
    assert f"digits/pcm {PCM} 600 64 000 – – – – – –" in text


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    for name, phases in (("a", 2), ("b", 8)):
        config = {"model": {"init_args": {"num_phases": phases, "ema_decay": 0.99}}}
        make_run(tmp_path, name, PCM, measured({4: 1.0}), config=config)
    text = section(page_of(tmp_path), "details")
    assert "model.init_args.num_phases 2 8" in text
    assert "ema_decay" not in text


# ---------------------------------------------------------------------- hostile and damaged input


def test_text_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    numbers = measured({4: 1.0}, role=evil.replace("/", ""), metric=evil)
    config = {"model": {"init_args": {"x": evil}}}
    make_run(tmp_path, evil, evil, numbers, config=config, pictures=False)
    make_run(tmp_path, "other", LCM, measured({4: 1.0}), config={"a": evil})
    MetricsCSV(tmp_path / "other" / "version_0").log_metrics({f"train/{evil}": 1.0}, 1)
    page = page_of(tmp_path, title=evil)
    assert page.count("<script>") == 1, "the page's own"
    assert "<script>alert" not in page
    assert evil in rows_of(page)


def test_missing_pieces_are_noted_and_the_rest_is_shown(demo: Path) -> None:
    bare = make_run(demo, "digits/bare", LCM, measured({4: 0.9}), curves=0, pictures=False)
    hurt = demo / "digits" / "lcm" / "version_0" / "samples" / "00000600_ema_4_steps.png"
    hurt.write_bytes(hurt.read_bytes()[:40])
    broken = demo / "digits" / "broken"
    broken.mkdir()
    (broken / "results.json").write_text('{"measurements": [')
    half = demo / "digits" / "half"
    half.mkdir()
    (half / "results.json").write_text('{"measurements": [{"metric": "x"}]}')
    page = page_of(demo)
    notes = plain(page.split('<aside class="missing">')[1].split("</aside>")[0])
    assert f"digits/bare ({bare}) has no metrics.csv" in notes
    assert f"digits/bare ({bare}) has no sample pictures" in notes
    assert f"The picture {hurt} cannot be read" in notes
    assert f"'{broken / 'results.json'}' is not a results file" in notes
    assert f"'{half / 'results.json'}' holds a measurement that cannot be read" in notes
    assert rows_of(page)["digits/bare"][1] == "0.900"


def test_a_single_damaged_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(FewstepError, match="fewstep evaluate"):
        page_of(tmp_path)


def test_folders_without_runs_are_an_error_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert front_door(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "no results.json" in message
    assert "fewstep evaluate" in message
    with pytest.raises(FewstepError, match="no folder"):
        page_of(tmp_path / "nowhere")


# ---------------------------------------------------------------------- command


def test_command_writes_beside_the_first_folder_unless_told_otherwise(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(demo / "digits" / "lcm"), str(demo)])
    assert str(demo / "digits" / "lcm" / "report.html") in capsys.readouterr().out
    page = (demo / "digits" / "lcm" / "report.html").read_text(encoding="utf-8")
    assert list(rows_of(page))[1:] == ["digits/teacher", "digits/lcm", "digits/pcm_4"]
    other = demo / "new" / "page.html"
    main([str(demo), "--output", str(other), "--title", "Digits & friends"])
    assert "<h1>Digits &amp; friends</h1>" in other.read_text(encoding="utf-8")
