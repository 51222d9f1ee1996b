from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fewstep.diffusion import PredictionType, VPSchedule, network_target, to_prediction

TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
# On the circle, on the flow's chord, and on neither.
LEVELS = [(0.8, 0.6), (0.07, math.sqrt(1 - 0.07**2)), (0.3, 0.7), (0.5, 1.9)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_right_network_output_is_read_as_the_truth(
    prediction_type: PredictionType, alpha: float, sigma: float
) -> None:
    x0, eps, levels = draw(0, 2, 3, 4), draw(1, 2, 3, 4), (scalar(alpha), scalar(sigma))
    output = network_target(x0, eps, *levels, prediction_type)
    prediction = to_prediction(output, alpha * x0 + sigma * eps, *levels, prediction_type)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_any_output_splits_the_sample_and_is_recovered(
    prediction_type: PredictionType, alpha: float, sigma: float
) -> None:
    x_t, output, levels = draw(0, 5), draw(1, 5), (scalar(alpha), scalar(sigma))
    prediction = to_prediction(output, x_t, *levels, prediction_type)
    split = alpha * prediction.x0 + sigma * prediction.eps
    torch.testing.assert_close(split, x_t, rtol=0, atol=1e-12)
    target = network_target(prediction.x0, prediction.eps, *levels, prediction_type)
    torch.testing.assert_close(target, output, rtol=0, atol=1e-12)


def test_v_is_the_velocity_of_diffusers() -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    schedule = VPSchedule.from_diffusers(scheduler)
    x0, eps, t = (
        draw(0, 3, 2, 4, 4).float(),
        draw(1, 3, 2, 4, 4).float(),
        torch.tensor([0, 400, 999]),
    )
    ours = network_target(x0, eps, *schedule.levels(t.float(), x0), "v_prediction")
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, eps, t), rtol=0, atol=1e-6)


def test_flow_is_the_derivative_of_the_straight_path() -> None:
    x0, eps = draw(0, 5), draw(1, 5)
    velocity = network_target(x0, eps, scalar(0.6), scalar(0.4), "flow_prediction")
    path = [(1 - s) * x0 + s * eps for s in (0.3, 0.5)]
    torch.testing.assert_close((path[1] - path[0]) / 0.2, velocity)


def test_the_alpha_floor_tames_the_division_where_alpha_is_small() -> None:
    x_t, eps = draw(0, 5), draw(1, 5)
    alpha, sigma = scalar(0.068265), scalar(0.997667)
    floored = to_prediction(eps, x_t, alpha, sigma, "epsilon", alpha_floor=0.5)
    torch.testing.assert_close(floored.x0, (x_t - sigma * eps) / 0.5)
    assert torch.equal(floored.eps, eps)
    # It breaks the boundary condition there; above the floor it changes nothing.
    assert (alpha * floored.x0 + sigma * eps - x_t).abs().max() > 0.1
    above = (x_t, scalar(0.8), scalar(0.6), "epsilon")
    assert torch.equal(to_prediction(eps, *above, 0.5).x0, to_prediction(eps, *above).x0)


@pytest.mark.parametrize("convert", [to_prediction, network_target])
def test_an_unknown_type_is_named(convert: object) -> None:
    with pytest.raises(ValueError, match="score"):
        convert(draw(0, 2), draw(1, 2), scalar(0.8), scalar(0.6), "score")
