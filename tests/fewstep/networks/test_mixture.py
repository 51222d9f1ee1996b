from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    AnalyticDenoiser,
    Backbone,
    Denoiser,
    FlowSchedule,
    Schedule,
    VPSchedule,
)
from fewstep.networks import RingMixture, ring
from fewstep.spec import build, describe


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x_t = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([990.0, 700.0, 500.0, 300.0, 20.0, 1.0], dtype=torch.float64)
    return x_t.to(dtype), t, {"class_labels": torch.tensor([0, 1, 2, 3, 4, 5])}


def test_modes_stand_evenly_on_the_circle() -> None:
    mixture = ring(5, radius=2.0, std=0.1)
    torch.testing.assert_close(mixture.means.norm(dim=1), torch.full((5,), 2.0).double())
    gaps = (mixture.means - mixture.means.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(gaps, gaps[:1].expand(5))
    assert float(gaps[0]) > 1  # all different
    torch.testing.assert_close(mixture.weights, torch.full((5,), 0.2).double())
    assert mixture.num_classes == 5


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()])
def test_untrained_it_is_the_analytic_teacher(schedule: Schedule) -> None:
    x_t, t, cond = inputs()
    network = Denoiser(RingMixture(schedule), schedule, "epsilon")
    exact = AnalyticDenoiser(ring(5), schedule)
    for condition in (cond, None):
        torch.testing.assert_close(network(x_t, t, condition).eps, exact(x_t, t, condition).eps)


def test_the_correction_trains_on_class_and_time() -> None:
    network, (x_t, t, cond) = RingMixture(VPSchedule()), inputs(torch.float32)
    exact = network(x_t, t, **cond).detach()
    torch.nn.init.normal_(network.outlet.weight)
    corrected = network(x_t, t, **cond)
    assert ((corrected - exact).abs().amax(1) > 1e-3).all()
    corrected.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in network.named_parameters()
    )


def test_the_guidance_input_is_heard_and_absent_means_zeros() -> None:
    network = RingMixture(VPSchedule(), guidance_embedding_dim=8)
    torch.nn.init.normal_(network.outlet.weight)
    x_t, t, cond = inputs(torch.float32)
    assert network.guidance_input == "guidance"
    assert RingMixture(VPSchedule()).guidance_input is None
    silent = network(x_t, t, **cond)
    assert torch.equal(network(x_t, t, **cond, guidance=torch.zeros(6, 8)), silent)
    assert not torch.allclose(network(x_t, t, **cond, guidance=torch.ones(6, 8)), silent)


def test_the_null_condition_drops_the_class_and_keeps_the_rest() -> None:
    network, guidance = RingMixture(VPSchedule(), guidance_embedding_dim=4), torch.ones(6, 4)
    null = network.null_cond({**inputs()[2], "guidance": guidance})
    assert null["class_labels"].tolist() == [5] * 6
    assert null["guidance"] is guidance


def test_half_precision_weights_leave_the_exact_part_in_float32() -> None:
    network, (x_t, t, cond) = RingMixture(VPSchedule()), inputs(torch.float32)
    output = copy.deepcopy(network).bfloat16()(x_t, t, **cond)
    assert torch.equal(output, network(x_t, t, **cond))


def test_feature_blocks_are_sub_modules_of_that_width() -> None:
    network = RingMixture(VPSchedule(), width=24, depth=3)
    assert list(network.feature_blocks.values()) == [24, 24, 24]
    for name in network.feature_blocks:
        assert network.get_submodule(name).out_features == 24


def test_a_described_network_is_rebuilt_with_its_schedule() -> None:
    network = RingMixture(FlowSchedule(3.0), num_modes=7, width=16, guidance_embedding_dim=4)
    rebuilt = build(describe(network), Backbone)
    rebuilt.load_state_dict(network.state_dict())
    x_t, t, _ = inputs(torch.float32)
    assert torch.equal(rebuilt(x_t, t), network(x_t, t))
    assert rebuilt.config == network.config
