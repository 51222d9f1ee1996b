"""Work of one rank for all: its result, and its failure, are everyone's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from callbacks.together import on_each_machine, on_every_rank, on_first_rank
from fewstep.errors import FewstepError
from lightning_modules.parallel import ReplicatedStrategy

from ranks import run_ranks
from rings import quiet_trainer


def attempt(folder: Path, fails: bool) -> list[str]:
    """What each rank gets from both, in order."""
    trainer = quiet_trainer(folder, [], 1, strategy=ReplicatedStrategy(), devices=2)
    trainer.strategy.setup_environment()

    def work() -> str:
        (folder / f"done by {dist.get_rank()}").touch()
        if fails:
            raise FewstepError("weights are missing")
        return f"made by rank {dist.get_rank()}"

    found: list[str] = []
    for together in (on_first_rank, on_each_machine):
        try:
            found.append(str(together(trainer, work)))
        except FewstepError as error:
            found.append(f"failed: {error}")
    return found


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (False, ["made by rank 0", "None"]),
        (True, ["failed: weights are missing", "failed: weights are missing"]),
    ],
)
def test_all_ranks_have_the_outcome_of_the_one_that_worked(
    tmp_path: Path, fails: bool, expected: list[str]
) -> None:
    assert run_ranks(2, attempt, tmp_path, fails) == [expected, expected]
    assert [path.name for path in tmp_path.glob("done by *")] == ["done by 0"]


def fail(folder: Path, together: Callable[..., Any], rank: int) -> str:
    """What a rank raises when another, or itself, runs out of memory."""
    trainer = quiet_trainer(folder, [], 1, strategy=ReplicatedStrategy(), devices=2)
    trainer.strategy.setup_environment()

    def work() -> None:
        if dist.get_rank() == rank:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    try:
        together(trainer, work)
    except Exception as error:
        dist.barrier()  # all ranks are out
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("together", "rank"),
    [(on_first_rank, 0), (on_each_machine, 0), (on_every_rank, 0), (on_every_rank, 1)],
)
def test_any_error_ends_all_ranks_and_is_itself_where_it_arose(
    tmp_path: Path, together: Callable[..., Any], rank: int
) -> None:
    found = run_ranks(2, fail, tmp_path, together, rank)
    assert found[rank] == "OutOfMemoryError: tried to allocate 80 GiB"
    assert found[1 - rank].startswith(f"FewstepError: Rank {rank} failed")
    assert "OutOfMemoryError: tried to allocate 80 GiB" in found[1 - rank]


def test_an_error_does_not_hold_what_filled_the_memory(tmp_path: Path) -> None:
    filling: list[Any] = []

    def work() -> None:
        large = torch.zeros(1000)
        filling.append(weakref.ref(large))
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError) as caught:
        on_first_rank(quiet_trainer(tmp_path, [], 1), work)
    assert caught.value.__traceback__ is not None
    assert filling[0]() is None
