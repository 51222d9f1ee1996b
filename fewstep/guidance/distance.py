"""What the guide itself says of finished samples: the "Distance" of the papers' tables."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance.described import described
from fewstep.guidance.energies import Energy
from fewstep.guidance.freezing import modules_within
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Better, Features, Metric, Reference, Samples, Statistics, to_uint8
from fewstep.metrics.means import Means


class EnergyOfSamples(Features):
    """An energy of each sample against its own target, ``energy (B,)``, of 8-bit pixels.

    Args:
        energy, target, pictures: see :class:`GuidanceDistance`.
    """

    name = "energy"

    def __init__(self, energy: Energy, target: str | None, pictures: bool) -> None:
        self.energy, self.target, self.pictures = energy, target, pictures
        self.networks = list(modules_within(energy))
        self._encode: Any = None
        if target == "prompt" or pictures:
            name = "encode_images" if pictures else "encode"
            self._encode = getattr(energy, name, None)
            if self._encode is None:
                raise FewstepError(
                    f"GuidanceDistance is to tell {type(energy).__name__} of "
                    f"{'pictures' if pictures else 'captions'}, and it compares nothing of them. "
                    "Give the energy, target and pictures of the experiment's steering."
                )

    def prepare(self) -> None:
        """Nothing lies on disk that was not read already."""

    def load(self, device: torch.device) -> None:
        """Moves the energy's networks to a device."""
        self.to(device)

    def to(self, device: torch.device) -> None:
        for network in self.networks:
            network.to(device)

    def judges(self) -> Sequence[nn.Module]:
        """None: what guides is no judge."""
        return []

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        pixels = samples.pixels
        if pixels.ndim > 2:
            pixels = to_uint8(pixels).float() / 127.5 - 1
        with full_float32(pixels.device):
            return {"energy": self.energy(pixels, self._aims(samples))}

    def _aims(self, samples: Samples) -> Tensor | None:
        """What the energy is told of each sample, ``(B, ...)``."""
        if self.target is None:
            return None
        if self.target == "prompt":
            assert samples.prompts is not None  # the metric needs them, and evaluations check
            return torch.as_tensor(self._encode(list(samples.prompts)))
        conditions = samples.cond or {}
        if self.target not in conditions:
            raise FewstepError(
                f"GuidanceDistance compares with each sample's '{self.target}', which these "
                "samples were not given; leave it out of the Evaluation callback's `metrics`."
            )
        aims = conditions[self.target].to(samples.pixels.device)
        return torch.as_tensor(self._encode(aims.float())) if self.pictures else aims

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "energy": described(self.energy),
            "target": self.target,
            "of_pictures": self.pictures,
            "pixels": "8-bit",
        }


class GuidanceDistance(Metric):
    """The mean of a guidance energy over samples, each against its target, ``guidance_distance``.

    It is the "Distance" of Shen et al. (2024, tables 1 and 5): how far guidance got, in the eyes of
    the guide. The guide's own opinion is no judge of samples, as a gradient can please the network
    that it comes from and no other: read it beside a distance from data or another network's word.
    It is compared between methods that were guided by the same energy, and refuses samples that
    another network guided; unguided ones are measured too.

    Args:
        energy: of finished pixels in [-1, 1]: that of the steering.
        target, pictures: what it is told of each sample, as in the steering.
    """

    reference: ClassVar[Reference] = "none"

    def __init__(
        self, energy: Energy, target: str | None = "class_labels", pictures: bool = False
    ) -> None:
        self.energies = EnergyOfSamples(energy, target, pictures)
        self.features: Features = self.energies
        self.needs_prompts = target == "prompt"
        self.needs_conditions = () if target in (None, "prompt") else (target,)
        self.better: dict[str, Better] = {"guidance_distance": "lower"}
        self.own_values = frozenset(self.better)

    def guides(self) -> Sequence[nn.Module]:
        return self.energies.networks

    def statistics(self) -> Statistics:
        return Means(["guidance_distance"], _energies)

    def statistics_identity(self) -> Hashable:
        return (type(self), self.energies.identity())

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        return generated.means()

    def protocol(self) -> dict[str, Any]:
        return {"metric": "guidance_distance", "features": self.energies.protocol()}


def _energies(features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
    return [features["energy"]]
