"""Several data sets in one stream."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import Mixed
from datamodules.fields import Images
from datamodules.mixed import Turns
from fewstep.errors import FewstepError

from shard_files import FakeTrainer, shards, write_numbered

WEIGHTS = {"clips": 3.0, "pictures": 1.0}


def mixed(folder: Path, trainer: FakeTrainer | None = None, **options: Any) -> Mixed:
    sources = {
        "clips": shards(folder / "clips", sample=Images(channels=1, as_video=True), **options),
        "pictures": shards(folder / "pictures", **options),
    }
    data = Mixed(sources, WEIGHTS)
    data.trainer = trainer or FakeTrainer()  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    return data


def read(data: Mixed, batches: int) -> list[Any]:
    found = []
    for batch in islice(iter(data.train_dataloader()), batches):
        ready = data.on_before_batch_transfer(batch, 0)
        found.append(data.on_after_batch_transfer(ready, 0))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbered(tmp_path / "clips", [7, 6])
    write_numbered(tmp_path / "pictures", [9, 8])
    return tmp_path


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=5), st.integers(1, 300))
def test_sources_stay_within_a_batch_of_their_shares(weights: list[float], count: int) -> None:
    seen = Counter(islice(Turns(weights), count))
    for number, weight in enumerate(weights):
        assert abs(seen[number] - count * weight / sum(weights)) < len(weights)


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=5), st.integers(0, 100))
def test_turns_go_on_from_their_counts(weights: list[float], done: int) -> None:
    turns = Turns(weights)
    whole = list(islice(turns, done + 10))
    counts = Counter(whole[:done])
    again = Turns(weights, [counts[n] for n in range(len(weights))])
    assert list(islice(again, 10)) == whole[done:]


def test_images_and_videos_come_in_one_stream_with_their_weights(folder: Path) -> None:
    batches = read(mixed(folder), 40)
    assert Counter(batch["source"] for batch in batches) == {"clips": 30, "pictures": 10}
    for batch in batches:
        assert batch["sample"].ndim == (5 if batch["source"] == "clips" else 4)
        assert float(batch["sample"].min()) >= -1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_source_resumes_exactly(folder: Path, num_workers: int) -> None:
    whole = [(b["source"], b["key"]) for b in read(mixed(folder, num_workers=num_workers), 21)]
    interrupted = mixed(folder, num_workers=num_workers)
    read(interrupted, 9)
    interrupted.trainer.global_step = 9  # type: ignore[union-attr]
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = mixed(folder, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert resumed.consumed() == [7, 2]
    resumed.trainer.global_step = 9  # type: ignore[union-attr]
    assert [(b["source"], b["key"]) for b in read(resumed, 12)] == whole[9:]
    resumed.trainer.global_step = 21  # type: ignore[union-attr]
    assert sum(resumed.consumed()) == 21


def test_all_held_out_batches_are_validated(folder: Path) -> None:
    data = mixed(folder)
    loader = data.val_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 7  # type: ignore[arg-type]
    assert sum(len(batch["key"]) for batch in batches) == 30


def test_what_cannot_be_mixed_says_why(folder: Path) -> None:
    source = shards(folder / "clips")
    with pytest.raises(FewstepError, match="same data sets as sources"):
        Mixed({"a": source}, {"b": 1.0})
    with pytest.raises(FewstepError, match="must be positive"):
        Mixed({"a": source}, {"a": 0.0})
    with pytest.raises(FewstepError, match="remainder: carry"):
        Mixed({"a": shards(folder / "clips", remainder="drop")}, {"a": 1.0})
    with pytest.raises(FewstepError, match="reference must be one of"):
        Mixed({"a": source}, {"a": 1.0}, reference="b")
