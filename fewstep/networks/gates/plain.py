"""Attention and norms as sums of products, which can be differentiated forward and then back.

Fused attention has no forward derivative. Those of torch's softmax and norms can be computed, but
not differentiated further: softmax's is computed in place, and that of a norm takes the mean and
the deviation for constants, which gives wrong gradients without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PlainOperations(TorchFunctionMode):
    """Within it, torch's attention, softmax and norms are the functions of this module."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _like(result: Tensor, x: Tensor) -> Tensor:
    """In the precision of what was given, except under autocast, which has these in float32."""
    return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`torch.softmax`."""
    given = input if dtype is None else input.to(dtype)
    wide = _wide(given)
    weights = (wide - wide.detach().amax(dim, keepdim=True)).exp()
    return _like(weights / weights.sum(dim, keepdim=True), given)


def functional_softmax(
    input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`torch.nn.functional.softmax`."""
    return softmax(input, dim, dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _wide(query @ key.transpose(-2, -1)) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(softmax(scores, -1).to(value.dtype), dropout_p) @ value


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn_enable: bool = True,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm`."""
    dims = tuple(range(-len(normalized_shape), 0))
    return _like(_affine(_standardised(_wide(input), dims, eps), weight, bias), input)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.rms_norm`."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = _wide(input)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    normalised = wide * (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
    return _like(_affine(normalised, weight, None), input)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn_enabled: bool = True,
) -> Tensor:
    """:func:`torch.nn.functional.group_norm`."""
    groups = _wide(input).unflatten(1, (num_groups, -1)).flatten(2)
    normalised = _standardised(groups, (2,), eps).reshape(input.shape)
    return _like(_by_channel(normalised, weight, bias), input)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm`, which leaves running statistics as they are."""
    wide = _wide(input)
    if training:
        normalised = _standardised(wide, (0, *range(2, input.ndim)), eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        scale = (running_var.to(wide.dtype) + eps).rsqrt()
        normalised = _by_channel(wide, scale, -running_mean.to(wide.dtype) * scale)
    return _by_channel(normalised, weight, bias).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.instance_norm`, which leaves running statistics as they are."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normalised = _standardised(_wide(input), tuple(range(2, input.ndim)), eps)
    return _by_channel(normalised, weight, bias).to(input.dtype)


def refused_attention(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`torch.nn.functional.multi_head_attention_forward`.

    Raises:
        NotImplementedError: always, as what it calls is out of this module's reach.
    """
    raise NotImplementedError("torch's MultiheadAttention attends inside of one function")


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    return _affine(x, *(None if p is None else p.reshape(shape) for p in (weight, bias)))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


PLAIN: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.softmax, Tensor.softmax), softmax),
    F.softmax: functional_softmax,
    **dict.fromkeys((F.layer_norm, torch.layer_norm), layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), group_norm),
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: refused_attention,
}
