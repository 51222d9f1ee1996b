"""Plain operations are torch's, and can be differentiated forward and then back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.networks.gates.plain import PlainOperations

WEIGHT, BIAS = torch.linspace(0.5, 2, 8).double(), torch.linspace(-1, 1, 8).double()
MASK = torch.ones(6, 6, dtype=torch.bool).tril(1)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (8,), WEIGHT.to(x), BIAS.to(x)),
    "rms_norm": lambda x: F.rms_norm(x, (8,), WEIGHT.to(x)),
    "typed softmax": lambda x: torch.softmax(input=x, dim=1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, WEIGHT[:6].to(x), BIAS[:6].to(x), True),
    "evaluated batch_norm": lambda x: F.batch_norm(
        x, BIAS[:6].to(x), WEIGHT[:6].to(x), WEIGHT[2:].to(x), BIAS[2:].to(x)
    ).tanh(),
    "instance_norm": lambda x: F.instance_norm(input=x, weight=WEIGHT[:6].to(x)),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 4, WEIGHT.to(x), BIAS.to(x)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(1), x.tanh()),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x.tanh(), is_causal=True, scale=2.0),
    "mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=MASK),
    "added mask": lambda x: F.scaled_dot_product_attention(
        *(3 * [x]), attn_mask=torch.arange(36.0).view(6, 6).to(x) / 9
    ),
    "groups": lambda x: F.scaled_dot_product_attention(
        x.view(3, 4, 3, 4).flatten(0, 0), *(2 * [x.view(3, 4, 3, 4)[:, :2]]), enable_gqa=True
    ),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_plain_operations_give_what_torchs_give(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8).double()
    with PlainOperations():
        found = OPERATIONS[name](x)
        half = OPERATIONS[name](x.bfloat16())
    torch.testing.assert_close(found, OPERATIONS[name](x), rtol=1e-12, atol=1e-13)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), found, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = OPERATIONS[name](x.float())
        with PlainOperations():
            found = OPERATIONS[name](x.float())
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("call", [torch.softmax, Tensor.softmax])
def test_the_dtype_of_a_softmax_is_its_third_argument(call: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 4).bfloat16()
    with PlainOperations():
        assert call(x, -1, torch.float64).dtype == torch.float64
        assert F.softmax(x, -1, 3, torch.float64).dtype == torch.float64


def test_running_statistics_are_left_as_they_are() -> None:
    norm = torch.nn.BatchNorm1d(6)
    with PlainOperations():
        norm(torch.randn(3, 6, 8))
    assert not norm.running_mean.any()


def test_torchs_multihead_attention_is_refused_and_not_computed_wrongly() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 6, 8)
    with PlainOperations(), pytest.raises(NotImplementedError, match="inside of one function"):
        attention(x, x, x)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_forward_derivatives_of_plain_operations_have_the_right_gradients(name: str) -> None:
    # Those of torch's own operations do not: layer_norm's fail this test.
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 6, 8).double().unbind()

    def size(x: Tensor) -> Tensor:
        with forward_ad.dual_level(), PlainOperations():
            dual: Any = OPERATIONS[name](forward_ad.make_dual(x, v))
            return forward_ad.unpack_dual(dual).tangent.square().sum()

    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(size(leaf), leaf)
    step, way = 1e-5, torch.randn_like(x)
    slope = (size(x + step * way) - size(x - step * way)) / (2 * step)
    assert (gradient * way).sum().item() == pytest.approx(slope.item(), rel=1e-6)
