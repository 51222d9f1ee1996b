"""Kept statistics of reference sets, where they can be kept and where not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fewstep.metrics import FrechetDistance, GaussianStatistics, ReferenceStore

from metric_cases import Flat

METRIC = FrechetDistance(Flat())
REFERENCE = {"records": 3}


def statistics() -> GaussianStatistics:
    found = GaussianStatistics()
    found.add(torch.eye(3))
    return found


def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    assert store.load(METRIC, REFERENCE) is None
    store.save(METRIC, REFERENCE, statistics())
    found = store.load(METRIC, REFERENCE)
    assert isinstance(found, GaussianStatistics)
    assert torch.equal(found.moments()[1], statistics().moments()[1])


def test_a_folder_that_cannot_be_written_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        ReferenceStore(tmp_path / "file" / "references").save(METRIC, REFERENCE, statistics())
    assert "cannot be kept" in caplog.text
    assert "FEWSTEP_CACHE" in caplog.text


def test_a_disk_that_is_full_only_warns_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("fewstep.metrics.references.save_file", half_written)
    with caplog.at_level(logging.WARNING):
        ReferenceStore(tmp_path).save(METRIC, REFERENCE, statistics())
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []
