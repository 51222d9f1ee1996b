"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_files import write_numbered


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of five images."""
    return write_numbered(tmp_path / "shards", [5, 5])
