"""Ranks that find out together what each would find alike, and fail together."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from fewstep import remembered
from fewstep.errors import FewstepError
from fewstep.together import in_turn, same_everywhere

from ranks import in_group, run_ranks


def hashed_in_turn(path: Path, machines: str = "aaa") -> tuple[str, int]:
    """A file's hash, and how often this rank read the file."""
    reads, read = 0, remembered._hashed

    def counting(paths: tuple[Path, ...]) -> str:
        nonlocal reads
        reads += 1
        return read(paths) + f" by rank {dist.get_rank()}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "_hashed", counting)
        patch.setattr(socket, "gethostname", lambda: machines[dist.get_rank()])
        found = in_turn(lambda: remembered.sha256_of(path))
        assert remembered.sha256_of(path) == found
    return found.split(" by ")[1], reads


def test_one_rank_hashes_for_its_whole_machine(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"content")
    assert run_ranks(2, in_group, hashed_in_turn, file) == [("rank 0", 1), ("rank 0", 0)]
    of_three = run_ranks(3, in_group, hashed_in_turn, file, "aba")
    assert of_three == [("rank 0", 1), ("rank 1", 1), ("rank 0", 0)]


def failing(rank: int, error: Exception) -> tuple[str, str]:
    def work() -> None:
        if dist.get_rank() == rank:
            raise error

    try:
        in_turn(work)
    except Exception as caught:
        return type(caught).__name__, str(caught)
    return "", ""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_read_all_complain_of(rank: int) -> None:
    wrong = FewstepError("There is no folder; give one.")
    expected = ("FewstepError", str(wrong))
    assert run_ranks(2, in_group, failing, rank, wrong) == [expected, expected]
    found = run_ranks(2, in_group, failing, rank, OSError("disk"))
    assert found[rank] == ("OSError", "disk")
    kind, message = found[1 - rank]
    assert kind == "FewstepError"
    assert f"Rank {rank} failed" in message


def alike(of_rank: Callable[[int], str]) -> str:
    try:
        return same_everywhere(of_rank(dist.get_rank()), "'models/sd'")
    except FewstepError as error:
        return str(error)


def one(rank: int) -> str:
    return "one"


def test_files_that_differ_between_machines_are_refused_on_all() -> None:
    assert run_ranks(2, in_group, alike, one) == ["one", "one"]
    for message in run_ranks(2, in_group, alike, str):
        assert message.startswith("'models/sd' is not the same on all machines")


def test_a_process_alone_just_works() -> None:
    assert in_turn(lambda: 3) == same_everywhere(3, "it")
    with pytest.raises(ValueError, match="none"):
        in_turn(lambda: int("none"))
