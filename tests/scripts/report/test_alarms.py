"""Alarms of a run's training, in words on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from report_runs import LCM, demo_runs, make_run, measured, page_of, section

VARIANCE = {
    "value": "train/motion_variance",
    "below": 0.01,
    "above": None,
    "advice": "It says less <and> less.",
}


def write(run: Path, *lines: dict[str, Any]) -> None:
    (run / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(update: int, state: str, **changes: Any) -> dict[str, Any]:
    mean = 0.00234 if state == "raised" else 0.5
    return {"update": update, "mean": mean, "state": state, **VARIANCE, **changes}


def test_each_alarm_is_a_sentence_and_says_whether_it_ended(tmp_path: Path) -> None:
    demo_runs(tmp_path)
    write(
        make_run(tmp_path, "digits/mcm", LCM, measured({4: 1.0})),
        line(1500, "raised"),
        line(1600, "raised", value="train/share", above=2.0, below=None, mean=3.0, advice=""),
        line(2000, "ended"),
        line(2500, "raised"),
    )
    page = page_of(tmp_path)
    text = section(page, "alarms")
    low = "train/motion_variance was 0.00234 on average at update"
    advice = "below 0.01. It says less <and> less."
    assert f"digits/mcm: {low} 1,500, {advice} It was back in its range at update 2,000." in text
    assert "3 on average at update 1,600, above 2. It was never back in its range." in text
    assert f"{low} 2,500, {advice} It was never back in its range." in text
    assert text.count("digits/mcm") == 3
    assert "<and>" not in page
    assert '<a href="#alarms">Alarms in training</a>' in page


def test_without_alarms_there_is_no_such_section(demo: Path) -> None:
    write(demo / "digits" / "lcm" / "version_0")
    assert "#alarms" not in page_of(demo)


@pytest.mark.parametrize("content", ["{", '{"update": 1}\n', "3\n"])
def test_a_damaged_file_is_noted(demo: Path, content: str) -> None:
    (demo / "digits" / "lcm" / "version_0" / "alarms.jsonl").write_text(content)
    page = page_of(demo)
    assert "#alarms" not in page
    missing = page.split('<aside class="missing">')[1].split("</aside>")[0]
    assert re.search(r"<li>digits/lcm [^<]*alarms\.jsonl", missing)
