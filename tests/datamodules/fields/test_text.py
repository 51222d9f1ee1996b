"""Captions and class labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from datamodules.fields import Caption, ClassLabel


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
