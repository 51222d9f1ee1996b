"""What tests of Adversarial Post-Training share: small methods, batches and draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.contracts import Batch
from fewstep.diffusion import Backbone, Denoiser, FlowSchedule
from fewstep.seeding import torch_generator
from lightning_modules import AdversarialPostTraining
from lightning_modules.adversarial_game import AdversarialDraws

from training_runs import teacher


def built(**options: Any) -> AdversarialPostTraining:
    """A method with its roles, of the same first weights each time."""
    torch.manual_seed(3)
    module = AdversarialPostTraining(**{"start": teacher, "teacher": teacher, **options})
    module.configure_model()
    return module.train()  # type: ignore[return-value]


def digits(size: int = 6) -> Batch:
    draws = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(size, 1, 8, 8, generator=draws),
        "cond": {"class_labels": torch.arange(size) % 10},
        "key": [str(number) for number in range(size)],
    }


def draw(module: AdversarialPostTraining, batch: Batch, seed: int = 1) -> AdversarialDraws:
    return module.draw(batch, torch_generator(seed, "test"))


def vectors(size: int, repeats: int = 1) -> tuple[Tensor, Tensor, AdversarialDraws]:
    """Real and generated vectors, each so many times, with perturbations that all differ."""
    made = torch.Generator().manual_seed(1)
    kind: dict[str, Any] = {"generator": made, "dtype": torch.float64}
    real, fake = torch.randn(2, size, 16, **kind).repeat(1, repeats, 1)
    noises = torch.randn(4, size * repeats, 16, **kind)
    return real, fake, AdversarialDraws(*noises, *torch.zeros(3, size * repeats))


class Flow(Backbone):
    """``v = a z + b``, and what times it was asked at."""

    def __init__(self, slope: float, offset: float) -> None:
        super().__init__()
        self.config = {}
        self.sample_shape = (1, 8, 8)
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), offset
        self.block = nn.Conv2d(1, 4, 1)
        self.times: list[float] = []

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {"block": 4}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        self.times += t.unique().tolist()
        self.block(x_t)
        return self.slope * x_t + self.offset


def flow(slope: float = 0.75, offset: float = -0.5) -> Denoiser:
    return Denoiser(Flow(slope, offset), FlowSchedule(shift=3.0), "flow_prediction")


def flow_module(**options: Any) -> AdversarialPostTraining:
    module = AdversarialPostTraining(**{"start": flow, "teacher": flow, **options})
    module.configure_model()
    return module
