"""The moving digits as a datamodule, alone and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import Mixed, MovingDigits
from datamodules.moving_clips import Scene, moving_clip

from shard_files import FakeTrainer, read


def moving(folder: Path, **options: Any) -> MovingDigits:
    data = MovingDigits(str(folder), num_clips=12, num_held_out=4, batch_size=4, **options)
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("kind", ["clear", "watermarked"])
def test_clips_are_those_that_were_drawn(tmp_path: Path, kind: Any) -> None:
    batches = read(moving(tmp_path, kind=kind))
    (batch,) = batches
    assert batch["sample"].shape == (4, 1, 16, 32, 32)
    for clip, key, label, prompt in zip(
        batch["sample"], batch["key"], batch["cond"]["class_labels"], batch["prompt"], strict=True
    ):
        drawn = moving_clip(int(key), 0, kind, "val")
        error = np.abs((clip[0].numpy() + 1) * 127.5 - drawn.frames).mean()
        assert error < 2
        assert int(label) == drawn.classes[0]
        assert prompt == f"{drawn.caption} moving"


def test_videos_and_crisp_images_come_in_one_stream(tmp_path: Path) -> None:
    sources = {
        "videos": moving(tmp_path, kind="watermarked"),
        "images": moving(tmp_path, kind="crisp"),
    }
    data = Mixed(dict(sources), {"videos": 1.0, "images": 1.0})
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    data.setup()
    shapes = {}
    for batch, _ in zip(data.train_dataloader(), range(4), strict=False):
        ready = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        shapes[ready["source"]] = tuple(ready["sample"].shape[1:])
    assert shapes == {"videos": (1, 16, 32, 32), "images": (1, 32, 32)}


def test_other_clips_are_another_reference_though_names_and_counts_are_equal(
    tmp_path: Path,
) -> None:
    made = [
        moving(tmp_path, kind=kind, seed=seed)
        for kind, seed in (("clear", 0), ("watermarked", 0), ("clear", 1))
    ]
    protocols = [data.reference_protocol() for data in made]
    assert len({protocol["records_sha256"] for protocol in protocols}) == 3
    assert all(
        {**one, "records_sha256": ""} == {**protocols[0], "records_sha256": ""} for one in protocols
    )
    again = moving(tmp_path / "again", kind="clear", seed=0)
    assert again.reference_protocol() == protocols[0]


def test_where_digits_end_is_a_condition_for_those_who_ask(tmp_path: Path) -> None:
    (batch,) = read(moving(tmp_path, end_position=True, max_digits=1))
    for key, end in zip(batch["key"], batch["cond"]["end_position"].numpy(), strict=True):
        clip = moving_clip(int(key), 0, split="val", scene=Scene(max_digits=1))
        np.testing.assert_allclose(end, clip.centres[0, -1], atol=1e-4)
