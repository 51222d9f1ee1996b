"""Learning rates and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from fewstep.seeding import torch_generator
from lightning_modules.optimisation import (
    BLOCK,
    Draws,
    check_accumulate,
    in_blocks,
    learning_rate_factor,
    micro_batches,
    noise_in_blocks,
)


@dataclass(frozen=True)
class Numbers(Draws):
    values: torch.Tensor


def test_a_batch_has_no_more_parts_than_samples() -> None:
    check_accumulate(4, 4)
    with pytest.raises(FewstepError, match="accumulate: 8 splits a batch of 3 a device"):
        check_accumulate(8, 3)


def test_warmup_rises_linearly_and_ends_at_one() -> None:
    factors = [learning_rate_factor(n, 4, 100, "constant") for n in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_decays_reach_their_middle_half_way(decay: str, middle: float) -> None:
    assert learning_rate_factor(60, 20, 100, decay) == pytest.approx(middle)  # type: ignore[arg-type]


def test_cosine_ends_at_zero() -> None:
    assert learning_rate_factor(100, 0, 100, "cosine") == pytest.approx(0)


def test_micro_batches_cover_a_ragged_batch_once_and_shares_sum_to_one() -> None:
    batch: Batch = {
        "sample": torch.arange(7.0)[:, None],
        "cond": {"class_labels": torch.arange(7)},
        "key": [str(i) for i in range(7)],
        "prompt": [f"caption {i}" for i in range(7)],
    }
    parts = list(micro_batches(batch, Numbers(torch.arange(7)), 3))
    assert sum(share for share, _, _ in parts) == pytest.approx(1)
    assert torch.cat([part["sample"] for _, part, _ in parts]).flatten().tolist() == list(range(7))
    assert [k for _, part, _ in parts for k in part["key"]] == [str(i) for i in range(7)]
    assert [p for _, part, _ in parts for p in part["prompt"]] == batch["prompt"]
    for _, part, draws in parts:
        assert isinstance(draws, Numbers)
        assert torch.equal(draws.values, part["cond"]["class_labels"])


@pytest.mark.parametrize("each", [1, 2])
def test_pictures_stay_with_the_samples_they_go_with(each: int) -> None:
    numbers = torch.arange(7 * each)
    batch: Batch = {
        "sample": torch.arange(7.0)[:, None],
        "cond": {},
        "key": [str(i) for i in range(7)],
        "images": {
            "sample": numbers[:, None].float(),
            "cond": {"class_labels": numbers},
            "key": [f"picture {i}" for i in range(7 * each)],
            "prompt": [f"caption {i}" for i in range(7 * each)],
        },
    }
    seen = []
    for _, part, _ in micro_batches(batch, Numbers(torch.arange(7)), 3):
        pictures = part["images"]
        mine = [int(i) * each + one for i in part["sample"] for one in range(each)]
        assert pictures["sample"].flatten().tolist() == mine
        assert pictures["cond"]["class_labels"].tolist() == mine
        assert pictures["key"] == [f"picture {i}" for i in mine]
        assert pictures["prompt"] == [f"caption {i}" for i in mine]
        seen += mine
    assert seen == numbers.tolist()


def test_a_batch_shorter_than_its_parts_has_as_many_parts_all_the_same() -> None:
    """Other ranks, whose batches are whole, gather sharded networks so many times."""
    batch: Batch = {"sample": torch.arange(3.0)[:, None], "cond": {}, "key": ["a", "b", "c"]}
    parts = list(micro_batches(batch, Numbers(torch.arange(3)), 4))
    assert len(parts) == 4
    assert sum(share for share, _, _ in parts) == 1
    counted = [float(part["sample"].item()) for share, part, _ in parts if share]
    assert counted == [0.0, 1.0, 2.0]
    assert all(len(part["sample"]) == 1 for _, part, _ in parts)


def noise(block: int) -> torch.Tensor:
    return torch.randn(BLOCK, 3, generator=torch_generator(0, "test", block))


@pytest.mark.parametrize(("world", "size"), [(1, 5), (1, 24), (2, 12), (3, 8), (4, 6), (8, 3)])
def test_ranks_draw_for_their_samples_what_one_device_draws_for_all(world: int, size: int) -> None:
    whole = noise_in_blocks(range(world * size), noise)
    assert len({tuple(row) for row in whole.tolist()}) == world * size  # all different
    ranks = [range(rank * size, (rank + 1) * size) for rank in range(world)]
    assert torch.equal(torch.cat([noise_in_blocks(rows, noise) for rows in ranks]), whole)
    drawn = [in_blocks(rows, lambda block: Numbers(noise(block))) for rows in ranks]
    assert torch.equal(Numbers.joined(drawn).rows(slice(None)).values, whole)  # type: ignore[arg-type]


def test_a_rank_draws_only_the_blocks_that_its_samples_are_in() -> None:
    asked: list[int] = []

    def counted(block: int) -> torch.Tensor:
        asked.append(block)
        return noise(block)

    found = noise_in_blocks(range(10, 17), counted)
    assert asked == [1, 2]
    assert found.untyped_storage().nbytes() == found.nbytes  # the rest of the blocks is not kept
