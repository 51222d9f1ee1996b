"""The latent-consistency (LCM) forms that differ from a plain jump."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.tables import expand_to, work_dtype


def boundary_scalings(
    t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """``(c_skip, c_out)`` of latent consistency models (Luo et al. 2023), each ``(B,)``.

    With ``t' = timestep_scaling * t``: ``c_skip = sd^2 / (t'^2 + sd^2)`` and
    ``c_out = t' / sqrt(t'^2 + sd^2)``. At ``t = 0`` they are exactly 1 and 0.
    """
    scaled = timestep_scaling * t.to(torch.float64 if t.device.type != "mps" else torch.float32)
    norm = scaled.square() + sigma_data**2
    return sigma_data**2 / norm, scaled / norm.sqrt()


def lcm_output(prediction: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
    """LCM's consistency function ``c_skip(t) x_t + c_out(t) x0``, ``(B, ...)``."""
    c_skip, c_out = (expand_to(c.to(work_dtype(x_t)), x_t) for c in boundary_scalings(t))
    return c_skip * x_t + c_out * prediction.x0


def guidance_embedding(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding ``(B, dim)`` of ``1000 w``; LCM's ``w`` is ``guidance_scale - 1``."""
    w = guidance_scale - 1
    embedding: Tensor = get_timestep_embedding(1000 * w, dim, downscale_freq_shift=1)
    return embedding
