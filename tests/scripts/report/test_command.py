"""The command: where it writes, and what."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.report import main

from report_runs import rows_of


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


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("output", "title", "tables", "max-megabytes"))
    assert max(map(len, text.splitlines())) <= 100
