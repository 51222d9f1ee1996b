from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewstep.networks import ema_update, warmed_up_decay


def constant(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(2, 3).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def test_repeated_updates_follow_the_closed_form() -> None:
    # mu^n a_0 + (1 - mu) sum_k mu^(n - k) w_k
    average, values, decay = constant(5.0, torch.float64), [1.0, -2.0, 4.0, 0.5], 0.9
    expected = 5.0 * decay ** len(values)
    for k, value in enumerate(values, start=1):
        ema_update(average, constant(value, torch.float64), decay)
        expected += (1 - decay) * decay ** (len(values) - k) * value
    for parameter in average.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


def test_every_parameter_follows_its_own() -> None:
    torch.manual_seed(0)
    average, source = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(2))
    before = copy.deepcopy(average)
    ema_update(average, source, 0.75)
    triples = zip(average.parameters(), before.parameters(), source.parameters(), strict=True)
    for now, old, new in triples:
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)


def test_a_float32_average_of_a_half_precision_network_keeps_small_changes() -> None:
    average = constant(1.0)
    for _ in range(100):
        ema_update(average, constant(2.0, torch.bfloat16), 0.9999)
    # One update changes 1 by 1e-4, which bfloat16 could not hold.
    expected = torch.full_like(average.weight, 2 - 0.9999**100)
    torch.testing.assert_close(average.weight, expected, rtol=0, atol=2e-5)
    assert average.weight.dtype == torch.float32


def test_buffers_are_copied_and_the_source_is_left_alone() -> None:
    average, source = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    source(torch.randn(8, 2) + 3)
    kept = copy.deepcopy(source.state_dict())
    ema_update(average, source, 0.999)
    assert torch.equal(average.running_mean, source.running_mean)
    assert average.num_batches_tracked == 1
    assert all(torch.equal(source.state_dict()[name], value) for name, value in kept.items())
    assert all(parameter.grad_fn is None for parameter in average.parameters())


def test_a_different_architecture_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"longer|shorter"):
        ema_update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)


def test_the_decay_warms_up() -> None:
    assert warmed_up_decay(0.9999, 0) == pytest.approx(0.1)
    assert warmed_up_decay(0.9999, 90) == pytest.approx(0.91)
    assert warmed_up_decay(0.9999, 10**6) == 0.9999
    assert warmed_up_decay(0.05, 0) == 0.05
