"""The page about data of one's own: its field reads records as it says."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml

from datamodules import Shards
from datamodules.fields import ClassLabel, Field

from shard_files import FakeTrainer, write_tar

PAGE = "adding_data.md"
SLOPE = np.linspace(0, 4810, 12, dtype=np.float32).reshape(3, 4)


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture
def field(
    blocks: Callable[[str, str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Field]:
    """The page's field, with the options of the page's experiment."""
    (code,), (experiment,) = blocks(PAGE, "python"), blocks(PAGE, "yaml")
    (tmp_path / "heights.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = yaml.safe_load(experiment)["data"]["init_args"]["sample"]
    module, _, name = given["class_path"].rpartition(".")
    yield getattr(importlib.import_module(module), name)(**given["init_args"])
    sys.modules.pop(module)


def test_its_field_gives_batches_in_range_and_sets_the_damaged_aside(
    field: Field, tmp_path: Path
) -> None:
    members = {}
    for number in range(4):
        members[f"{number}.npy"] = npy(SLOPE if number else SLOPE[0])
        members[f"{number}.cls"] = b"7"
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}-000000.tar", members)
    shards = (str(tmp_path / "train-*.tar"), str(tmp_path / "val-*.tar"))
    data = Shards(*shards, 4, field, {"class_labels": ClassLabel()})
    data.trainer = cast(Any, FakeTrainer())
    data.prepare_data()
    with pytest.warns(UserWarning, match="damaged record"):
        (reference,) = data.reference_batches()
    expected = torch.from_numpy(SLOPE / 2405 - 1).expand(3, 1, 3, 4)
    torch.testing.assert_close(reference["sample"], expected)
    assert reference["cond"]["class_labels"].tolist() == [7, 7, 7]
    assert list(data.damage.records.values()) == ["its array has 1 dimensions, not 2"]


def test_its_field_flips_by_the_records_own_generator_alone(field: Field) -> None:
    kinds = set()
    for seed in range(8):
        first, again = (
            field.decode(npy(SLOPE), "npy", partial(np.random.default_rng, seed)).value
            for _ in range(2)
        )
        assert torch.equal(first, again)
        kinds.add(float(first[0, 0]))
    assert kinds == {float(SLOPE[0, 0]), float(SLOPE[0, -1])}
