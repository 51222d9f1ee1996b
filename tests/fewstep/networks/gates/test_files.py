"""Gates in files: who writes them, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gate_spec,
    gates_of,
    has_gates,
    load_gates,
    save_gates,
)

FILES = ["rdm_gates.json", "rdm_gates.safetensors"]


def gated(**options: str) -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2))
    apply_gates(network, ResidualGates(include=["0"], **options))  # type: ignore[arg-type]
    return network


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of two ranks, whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1], indirect=True)
def test_of_several_ranks_the_first_one_writes(rank: int, tmp_path: Path) -> None:
    assert save_gates(gated(), tmp_path / "new") == tmp_path / "new" / FILES[1]
    assert sorted(path.name for path in tmp_path.glob("new/*")) == (FILES if rank == 0 else [])


@pytest.mark.parametrize("failing", FILES)
def test_there_are_gates_only_once_both_files_are_whole(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == failing:
            raise OSError("the disk is full")
        return rename(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="full"):
            save_gates(gated(), tmp_path)
    assert not has_gates(tmp_path)
    saved = gated(mode="alpha")
    with torch.no_grad():
        next(gates_of(saved))[1].get_parameter("delta").fill_(0.5)
    save_gates(saved, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    again = nn.Sequential(nn.Linear(2, 2))
    assert load_gates(again, tmp_path) == gate_spec(saved)
    assert next(gates_of(again))[1].get_parameter("delta").item() == 0.5
