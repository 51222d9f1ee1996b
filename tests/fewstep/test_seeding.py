from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fewstep.seeding import (
    derived_seed,
    global_generators,
    normal_like,
    numpy_generator,
    torch_generator,
)


def test_seeds_differ_in_every_argument() -> None:
    arguments = itertools.product([0, 1, 2**31], ["noise", "data"], [0, 1, 2], [0, 1, 2])
    seeds = [derived_seed(seed, stream, *counters) for seed, stream, *counters in arguments]
    assert len(set(seeds)) == len(seeds)
    # Counters are not added up or run together.
    assert len({derived_seed(0, "x", *c) for c in [(1, 2), (2, 1), (3, 0), (12, 0), (0, 12)]}) == 5


def test_seeds_fit_every_generator() -> None:
    for update in range(1000):
        assert 0 <= derived_seed(7, "noise", update) < 2**63


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    # A run resumes only if these never change: SeedSequence of (seed, crc32 of the name, counters).
    assert derived_seed(3, "noise", 5, 1) == 3_129_043_479_967_712_435
    assert derived_seed(0, "data") == 1_605_858_607_080_498_671


def test_generators_repeat_and_do_not_touch_the_global_state() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws = [torch.randn(4, generator=torch_generator(1, "noise", k)) for k in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    rows = [numpy_generator(1, "noise", k).permutation(100).tolist() for k in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_layers_that_draw_by_themselves_repeat_what_they_drew() -> None:
    def masks(*counters: int) -> list[torch.Tensor]:
        with global_generators(1, "layers", *counters):
            return [torch.nn.functional.dropout(torch.ones(40)) for _ in range(2)]

    before = torch.get_rng_state()
    first = masks(3, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(3, 0), strict=True))
    different = [first[0], first[1], masks(4, 0)[0], masks(3, 1)[0]]
    assert len({tuple(mask.tolist()) for mask in different}) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_devices_own_numbers_repeat_without_waiting_for_it() -> None:
    ones = torch.ones(40, device="cuda")

    def mask() -> torch.Tensor:
        with global_generators(1, "layers", 3, 0, device="cuda"):
            return torch.nn.functional.dropout(ones)

    before = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, _, second = mask(), torch.rand(7, device="cuda"), mask()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    assert not torch.equal(torch.cuda.get_rng_state(), before)  # by the numbers in between alone
    with torch.random.fork_rng(devices=[0]):
        torch.cuda.set_rng_state(before)
        torch.rand(7, device="cuda")
        expected = torch.cuda.get_rng_state()
    assert torch.equal(torch.cuda.get_rng_state(), expected)


def test_neighbouring_streams_are_uncorrelated() -> None:
    draws = torch.stack(
        [torch.randn(2000, generator=torch_generator(0, "noise", k)) for k in range(8)]
    )
    correlation = draws.corrcoef() - torch.eye(8)
    assert correlation.abs().max() < 0.1


def test_a_samples_numbers_do_not_depend_on_the_batch_it_is_in() -> None:
    like = torch.empty(6, 3, 4)

    def drawn(*numbers: int) -> torch.Tensor:
        sources = [torch_generator(0, "sampler", number) for number in numbers]
        return normal_like(like[: len(numbers)], sources)

    together = drawn(0, 1, 2, 3, 4, 5)
    assert together.shape == like.shape
    assert torch.equal(together[[4, 1]], drawn(4, 1))
    assert len(set(together.flatten().tolist())) == together.numel()


def test_one_generator_draws_for_a_whole_batch_as_torch_does() -> None:
    like = torch.empty(2, 3, dtype=torch.float64)
    expected = torch.randn(2, 3, generator=torch_generator(0, "x"), dtype=torch.float64)
    assert torch.equal(normal_like(like, torch_generator(0, "x")), expected)
