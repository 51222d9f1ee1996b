"""Runs that most of the report's tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from report_runs import demo_runs


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A teacher, an LCM student and a PCM student that is a little worse than the teacher."""
    return demo_runs(tmp_path)
