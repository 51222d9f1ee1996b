"""What a network's output says about a noisy sample, in one common form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True)
class Prediction:
    """Clean sample and noise implied by one network evaluation.

    Attributes:
        x0: predicted clean sample, ``(B, ...)``.
        eps: predicted noise, ``(B, ...)``; ``x_t = alpha x0 + sigma eps`` unless alpha is floored.
    """

    x0: Tensor
    eps: Tensor


def to_prediction(
    output: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: PredictionType,
    alpha_floor: float = 0.0,
) -> Prediction:
    """Converts a raw network output into ``(x0, eps)``: the only place that knows its type.

    For ``v_prediction`` (``v = alpha eps - sigma x0``; Salimans & Ho 2022) and ``flow_prediction``
    (``v = eps - x0``) the system is solved without assuming ``alpha^2 + sigma^2 = 1`` or
    ``alpha + sigma = 1``.

    Args:
        output: network output, ``(B, ...)``.
        x_t: noisy sample, ``(B, ...)``.
        alpha, sigma: schedule coefficients, broadcastable to ``x_t``.
        prediction_type: what ``output`` estimates, in diffusers' words.
        alpha_floor: divide by ``max(alpha, alpha_floor)`` for epsilon networks, which keeps
            ``1 / alpha_T`` from amplifying errors (PCM, appendix III.1, uses 0.5). It breaks
            ``jump(t -> t) = x_t`` wherever ``alpha < alpha_floor``, so it suits edges near 0 only.
    """
    if prediction_type == "epsilon":
        divisor = alpha.clamp_min(alpha_floor) if alpha_floor else alpha
        return Prediction((x_t - sigma * output) / divisor, output)
    if prediction_type == "sample":
        tiny = torch.finfo(sigma.dtype).tiny
        return Prediction(output, (x_t - alpha * output) / sigma.clamp_min(tiny))
    if prediction_type == "v_prediction":
        norm = alpha.square() + sigma.square()
        return Prediction(
            (alpha * x_t - sigma * output) / norm, (alpha * output + sigma * x_t) / norm
        )
    if prediction_type == "flow_prediction":
        norm = alpha + sigma
        return Prediction((x_t - sigma * output) / norm, (x_t + alpha * output) / norm)
    raise ValueError(f"Unknown prediction type '{prediction_type}'.")


def network_target(
    x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What a network of ``prediction_type`` should output; the inverse of :func:`to_prediction`."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x0
    if prediction_type == "flow_prediction":
        return eps - x0
    raise ValueError(f"Unknown prediction type '{prediction_type}'.")
