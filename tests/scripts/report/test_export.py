"""Tables as files."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from report_runs import LCM, PROTOCOL, make_run, measured, page_of


def tables_of(root: Path) -> Path:
    page_of(root, tables=root / "tables")
    return root / "tables"


def test_every_table_is_written_in_three_formats(demo: Path) -> None:
    names = sorted(path.name for path in tables_of(demo).iterdir())
    board = "leaderboard-frechet_digit_classifier"
    assert names == [f"{t}.{end}" for t in ("cost", board) for end in ("csv", "md", "tex")]


def test_the_csv_has_full_precision_and_the_spread_in_a_column_of_its_own(tmp_path: Path) -> None:
    make_run(tmp_path, "a, b", LCM, measured({1: 1 / 3, 4: [1.0, 2.0]}))
    (path,) = tables_of(tmp_path).glob("leaderboard*.csv")
    (row,) = csv.DictReader(path.open(encoding="utf-8"))
    assert row["run"] == "a, b"
    assert float(row["1 step"]) == 1 / 3
    assert float(row["4 steps"]) == 1.5
    assert float(row["4 steps ±"]) == 0.5**0.5
    assert "1 step ±" not in row


def test_markdown_and_latex_mark_the_best_and_what_must_not_be_compared(demo: Path) -> None:
    odd = measured({4: 0.01}, protocol={**PROTOCOL, "resize": "bicubic"})
    make_run(demo, "digits/odd_100%", LCM, odd)
    folder = tables_of(demo)
    (markdown,) = folder.glob("leaderboard*.md")
    lines = markdown.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["| run | 1 step | 4 steps | 50 steps |", "| :-- | --: | --: | --: |"]
    assert "| digits/pcm_4 | – | **0.315** | – |" in lines
    assert "| digits/odd_100% (a) | – | 0.0100 | – |" in lines
    (latex,) = folder.glob("leaderboard*.tex")
    text = latex.read_text(encoding="utf-8")
    assert r"digits/pcm\_4 & -- & \textbf{0.315} & -- \\" in text
    assert r"digits/odd\_100\% (a) & -- & 0.0100 & -- \\" in text
    assert re.search(r"\\begin\{tabular\}\{lrrr\}", text)
