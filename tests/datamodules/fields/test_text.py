"""Captions, class labels and numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from datamodules.fields import Caption, ClassLabel, Numbers


def test_captions_come_from_text_or_from_an_entry_of_json() -> None:
    assert Caption().decode("ein Füßchen \n".encode(), "txt", None).value == "ein Füßchen"
    nested = json.dumps({"text": {"long": "a cat"}}).encode()
    assert Caption("text.long", keys=["json"]).decode(nested, "json", None).value == "a cat"


def test_one_of_several_captions_is_drawn_and_evaluation_takes_the_first() -> None:
    data = json.dumps({"caption": ["a", "b", "c"]}).encode()
    field = Caption()
    drawn = {
        field.decode(data, "json", lambda s=seed: np.random.default_rng(s)).value  # type: ignore[misc]
        for seed in range(30)
    }
    assert drawn == {"a", "b", "c"}
    assert field.decode(data, "json", None).value == "a"


@pytest.mark.parametrize(
    ("data", "extension", "what"),
    [
        (b"\xff\xfe", "txt", "decode"),
        (b"{", "json", "property name"),
        (b'{"other": 1}', "json", "no entry 'caption'"),
        (b'{"caption": 3}', "json", "is no text"),
        (b'{"caption": []}', "json", "is no text"),
        (b"x" * 30, "txt", "more than max_characters"),
    ],
)
def test_what_is_no_caption_is_an_error(data: bytes, extension: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Caption(max_characters=20).decode(data, extension, None)


def test_class_labels_are_integers_below_the_number_of_classes() -> None:
    assert ClassLabel(10).decode(b" 9\n", "cls", None).value == 9
    for data in (b"10", b"-1"):
        with pytest.raises(ValueError, match="is not below 10"):
            ClassLabel(10).decode(data, "cls", None)
    with pytest.raises(ValueError, match="no integer: b'cat'"):
        ClassLabel().decode(b"cat", "cls", None)


FACTS = json.dumps({"score": 3, "tracks": [[[1, 2.5], [3, 4]]], "name": "x", "on": True}).encode()


def test_numbers_come_from_an_entry_of_json_through_objects_and_lists() -> None:
    score, end = Numbers("score"), Numbers("tracks.0.-1", count=2)
    found = [field.decode(FACTS, "json", None).value for field in (score, end)]
    assert [value.tolist() for value in found] == [3.0, [3.0, 4.0]]
    batch = end.collate([found[1], found[1]])
    assert (batch.shape, batch.dtype) == ((2, 2), torch.float32)


@pytest.mark.parametrize(
    ("field", "what"),
    [
        (Numbers("scores"), "no entry 'scores'"),
        (Numbers("tracks.1"), "no entry 'tracks.1'"),
        (Numbers("score.0"), "no entry 'score.0'"),
        (Numbers("tracks.0"), "not made of numbers"),
        (Numbers("name"), "not made of numbers"),
        (Numbers("on"), "not made of numbers"),
        (Numbers("tracks.0.0"), "is not one number"),
        (Numbers("tracks.0.0", count=3), "is not 3 numbers"),
        (Numbers("score", count=1), "is not 1 numbers"),
    ],
)
def test_what_is_not_the_numbers_that_were_asked_for_is_refused(field: Numbers, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        field.decode(FACTS, "json", None)
