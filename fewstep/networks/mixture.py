"""An exact mixture denoiser with a small trainable correction, for two-dimensional experiments."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from fewstep.diffusion.analytic import GaussianMixture
from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.diffusion.schedules import Schedule
from fewstep.diffusion.tables import work_dtype
from fewstep.spec import Spec, build, describe


def ring(num_modes: int, radius: float = 1.0, std: float = 0.1) -> GaussianMixture:
    """``num_modes`` equal modes on a circle in the plane; each mode is a class of its own."""
    angles = 2 * math.pi * torch.arange(num_modes, dtype=torch.float64) / num_modes
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(means, torch.full((num_modes,), std, dtype=torch.float64))


class RingMixture(Backbone):
    """Epsilon network: the exact noise of a ring of Gaussians plus a zero-initialised MLP.

    Untrained it *is* the analytic teacher; a copy whose correction is trained is a student.

    Args:
        schedule: the schedule in which the mixture is denoised.
        num_modes, radius, std: the ring.
        width, depth: hidden width and number of hidden blocks of the correction.
        guidance_embedding_dim: size of a guidance-scale input (LCM's w-embedding); 0 is none.
    """

    def __init__(
        self,
        schedule: Schedule | Spec,
        num_modes: int = 5,
        radius: float = 1.0,
        std: float = 0.1,
        width: int = 96,
        depth: int = 2,
        guidance_embedding_dim: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            schedule = build(schedule, Schedule)  # type: ignore[type-abstract]
        self.schedule = schedule
        self.config = {
            "schedule": describe(schedule),
            "num_modes": num_modes,
            "radius": radius,
            "std": std,
            "width": width,
            "depth": depth,
            "guidance_embedding_dim": guidance_embedding_dim,
        }
        self.sample_shape = (2,)
        self.num_classes = num_modes
        self.mixture = ring(num_modes, radius, std)
        if guidance_embedding_dim:
            self.guidance_input = "guidance"
        self.guidance_embedding_dim = guidance_embedding_dim
        self.inlet = nn.Linear(2 + width + guidance_embedding_dim, width)
        self.labels = nn.Embedding(num_modes + 1, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.outlet = nn.Linear(width, 2)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)
        self.width = width

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {f"hidden.{i}": self.width for i in range(len(self.hidden))}

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        null = {"class_labels": torch.full_like(cond["class_labels"], self.num_classes)}
        return {**cond, **null}

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Args: ``x_t (B, 2)``, ``t (B,)``, ``class_labels (B,)``, ``guidance (B, dim)``."""
        mixture = self.mixture.to(x_t.to(work_dtype(x_t)))
        exact = mixture.predict(x_t, self.schedule.levels(t, x_t), class_labels).eps
        dtype = self.inlet.weight.dtype
        inputs = [x_t.to(dtype), get_timestep_embedding(t, self.width).to(dtype)]
        if self.guidance_embedding_dim:
            size = (len(x_t), self.guidance_embedding_dim)
            inputs.append(
                x_t.new_zeros(size, dtype=dtype) if guidance is None else guidance.to(dtype)
            )
        hidden = self.inlet(torch.cat(inputs, dim=1))
        if class_labels is not None:
            hidden = hidden + self.labels(class_labels)
        for layer in self.hidden:
            hidden = hidden + layer(nn.functional.silu(hidden))
        correction: Tensor = self.outlet(nn.functional.silu(hidden))
        return exact + correction.to(exact.dtype)
