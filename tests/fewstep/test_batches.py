"""Parts of batches."""

from __future__ import annotations

import pytest
import torch

from fewstep.batches import in_shape_of, rows_of
from fewstep.contracts import Batch


def batch(count: int, name: str) -> Batch:
    numbers = torch.arange(count)
    return {
        "sample": numbers[:, None].float(),
        "cond": {"class_labels": numbers},
        "key": [f"{name} {i}" for i in range(count)],
        "prompt": [f"caption {i}" for i in range(count)],
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(slice(1, 3), [1, 2]), (slice(2, None), [2, 3]), ([3, 0, 3], [3, 0, 3]), ([], [])],
)
def test_a_part_has_all_that_belongs_to_its_samples(
    rows: slice | list[int], expected: list[int]
) -> None:
    whole = batch(4, "video")
    whole["images"] = batch(12, "picture")
    part = rows_of(whole, rows)
    theirs = [3 * i + one for i in expected for one in range(3)]
    for found, numbers, name in ((part, expected, "video"), (part["images"], theirs, "picture")):
        assert found["sample"].flatten().tolist() == numbers
        assert found["cond"]["class_labels"].tolist() == numbers
        assert found["key"] == [f"{name} {i}" for i in numbers]
        assert found["prompt"] == [f"caption {i}" for i in numbers]


def test_a_range_of_samples_is_not_copied() -> None:
    whole = batch(4, "video")
    assert rows_of(whole, slice(1, 3))["sample"].data_ptr() == whole["sample"][1:].data_ptr()


def test_a_batch_of_another_size_has_as_many_pictures_a_video_and_no_memory() -> None:
    whole = batch(4, "video")
    whole["images"] = batch(12, "picture")
    other = in_shape_of(whole, 1000)
    assert other["sample"].shape == (1000, 1)
    assert other["images"]["sample"].shape == (3000, 1)
    assert other["sample"].untyped_storage().nbytes() == whole["sample"].nbytes
