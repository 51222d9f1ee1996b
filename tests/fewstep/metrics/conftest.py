"""Weights of Inception that several test files look through."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.benchmarks.fid import random_weights


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, under a name that promises no hash."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    random_weights(path)
    return path
