"""The page as a whole: what is in it, and what it says when pieces are missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewstep.errors import FewstepError
from scripts.loggers import MetricsCSV
from scripts.main import main as front_door

from report_runs import (
    LCM,
    PCM,
    make_run,
    measured,
    page_of,
    plain,
    rows_of,
    section,
)


def test_the_page_needs_nothing_from_elsewhere(demo: Path) -> None:
    page = page_of(demo)
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "@import" not in page
    assert "url(" not in page


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
    text = section(page_of(tmp_path), "settings")
    assert "run model.init_args.num_phases a 2 b 8" in text
    assert "ema_decay" not in text


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
    assert evil in section(page, "leaderboard")
    assert evil in section(page, "curves")


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
