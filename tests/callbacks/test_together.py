"""Work of one rank for all: its result, and its failure, are everyone's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from callbacks.together import on_each_machine, on_first_rank
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


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    def work() -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        on_first_rank(quiet_trainer(tmp_path, [], 1), work)
