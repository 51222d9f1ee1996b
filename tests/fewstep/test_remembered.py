"""What files say is found once, and again when they change."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fewstep.remembered import Remembered, sha256_of


def test_a_file_is_read_once_and_again_once_it_has_changed(tmp_path: Path) -> None:
    file, reads = tmp_path / "weights", 0
    remembered = Remembered()

    def content() -> bytes:
        nonlocal reads
        reads += 1
        return file.read_bytes()

    file.write_bytes(b"old")
    assert [remembered.of("content", [file], content) for _ in range(3)] == [b"old"] * 3
    assert reads == 1
    assert remembered.of("something else", [file], lambda: 7) == 7
    file.write_bytes(b"newer")
    assert remembered.of("content", [file], content) == b"newer"
    assert reads == 2


def test_what_one_has_learned_the_other_need_not_find(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"content")
    teller, listener = Remembered(), Remembered()
    teller.of("length", [file], lambda: 7)
    listener.learn(teller.known())
    assert listener.of("length", [file], lambda: pytest.fail("it was told")) == 7


def test_a_hash_is_of_all_files_one_after_the_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"ab")
    second.write_bytes(b"c")
    assert sha256_of(first, second) == hashlib.sha256(b"abc").hexdigest()
    assert sha256_of(second, first) == hashlib.sha256(b"cab").hexdigest()
    assert sha256_of(first) == hashlib.sha256(b"ab").hexdigest()
