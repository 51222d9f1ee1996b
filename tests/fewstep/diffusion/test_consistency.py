from __future__ import annotations

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

from fewstep.diffusion import Prediction, TimeGrid, VPSchedule
from fewstep.diffusion.consistency import boundary_scalings, guidance_embedding, lcm_output


def test_the_boundary_is_the_identity() -> None:
    c_skip, c_out = boundary_scalings(torch.zeros(1))
    assert (float(c_skip), float(c_out)) == (1, 0)
    x_t, wild = torch.randn(2, 3), torch.full((2, 3), 1e6)
    assert torch.equal(lcm_output(Prediction(wild, wild), x_t, torch.zeros(2)), x_t)


def test_on_the_solver_grid_the_output_is_the_predicted_sample() -> None:
    times = TimeGrid.uniform(VPSchedule(), 50).times.home
    c_skip, c_out = boundary_scalings(times)
    assert float(c_skip.max()) == pytest.approx(0.25 / (190**2 + 0.25))  # at t = 19
    assert float(c_skip.max()) < 7e-6
    assert float((1 - c_out).max()) < 7e-6


def test_scalings_are_those_of_diffusers() -> None:
    scheduler, times = LCMScheduler(), torch.tensor([0.0, 1.0, 19.0, 499.0, 999.0])
    for t, *ours in zip(times, *boundary_scalings(times), strict=True):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t.double())
        assert [float(c) for c in ours] == pytest.approx([float(c) for c in theirs], abs=1e-12)


def test_each_sample_is_mixed_at_its_own_time() -> None:
    x_t, x0 = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    mixed = lcm_output(Prediction(x0, x0), x_t, torch.tensor([0.0, 0.05]))
    assert mixed[0].eq(1).all()
    torch.testing.assert_close(mixed[1], torch.full((3, 4, 4), 0.5))  # t' = sigma_data: one half


@pytest.mark.parametrize("dim", [256, 32, 7])
def test_the_guidance_embedding_is_that_of_the_diffusers_pipeline(dim: int) -> None:
    scale = torch.tensor([1.0, 2.5, 8.5, 15.0])
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    theirs = embed(None, scale - 1, embedding_dim=dim)
    # Angles reach 14,000, where neighbouring float32 values are 1e-3 apart.
    torch.testing.assert_close(guidance_embedding(scale, dim), theirs, rtol=0, atol=2e-3)


def test_no_guidance_is_embedded_as_zero_angles() -> None:
    embedding = guidance_embedding(torch.ones(1), 8)[0]
    assert embedding.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
