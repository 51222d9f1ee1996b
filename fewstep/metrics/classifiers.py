"""What classifiers say of samples that were to show a class: those that guided, and a judge."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Better, Features, Metric, Reference, Samples, Statistics, to_uint8
from fewstep.metrics.fingerprints import fingerprint, shares_weights
from fewstep.metrics.judging import correct
from fewstep.metrics.means import Means


class GuideAndJudge(Features):
    """Logits ``guide`` and ``judge`` of two classifiers, of pixels rounded to 8 bits.

    Args:
        guide: takes samples ``(B, ...)`` and gives logits ``(B, classes)``: one that steers.
        judge: another network, of another kind or trained on other data, that has no part in
            sampling, nor in choosing how strongly to steer.
        shift, factor: both see ``(x0 + shift) * factor``; 1 and 0.5 turn [-1, 1] into [0, 1].

    Raises:
        FewstepError: if the two are the same network.
    """

    name = "classifiers"

    def __init__(
        self, guide: nn.Module, judge: nn.Module, shift: float = 0.0, factor: float = 1.0
    ) -> None:
        self.networks = {"guide": guide.eval(), "judge": judge.eval()}
        self.shift, self.factor = shift, factor
        self.sha256 = {name: fingerprint(network) for name, network in self.networks.items()}
        if shares_weights(guide, judge):
            raise FewstepError(
                "GuideAndJudge was given one network as guide and judge, whose gap would always be "
                "0. Give a judge of another kind, or one that was trained on other data."
            )

    def prepare(self) -> None:
        """Nothing lies on disk that was not read already."""

    def load(self, device: torch.device) -> None:
        """Moves both to a device."""
        self.to(device)

    def to(self, device: torch.device) -> None:
        for network in self.networks.values():
            network.to(device)

    def judges(self) -> Sequence[nn.Module]:
        return [self.networks["judge"]]

    def identity(self) -> Hashable:
        return (type(self), *self.sha256.values(), self.shift, self.factor)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        pixels = samples.pixels
        if pixels.ndim > 2:
            pixels = to_uint8(pixels).float() / 127.5 - 1
        seen = (pixels + self.shift) * self.factor
        with full_float32(pixels.device):
            return {name: network(seen) for name, network in self.networks.items()}

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "guide_sha256": self.sha256["guide"],
            "judge_sha256": self.sha256["judge"],
            "pixels": "8-bit",
            "shift": self.shift,
            "factor": self.factor,
        }


class ClassAccuracy(Metric):
    """Do samples show the class they were to show? ``guide_accuracy`` and ``judge_accuracy``.

    ``guide_judge_gap`` is the first less the second: well above 0, guidance pleased the network it
    came from and no other (Shen et al. 2024, section 3.2, who compare losses instead).

    Args:
        features: the two classifiers.
        label: name of the condition that tells each sample's class.
    """

    reference: ClassVar[Reference] = "none"

    def __init__(self, features: GuideAndJudge, label: str = "class_labels") -> None:
        self.features: Features = features
        self.label = label
        self.needs_conditions = (label,)
        self.named_guide = features.networks["guide"]
        self.better: dict[str, Better] = {
            "guide_accuracy": "higher",
            "judge_accuracy": "higher",
            "guide_judge_gap": "lower",
        }
        self.own_values = frozenset(self.better)

    def guides(self) -> Sequence[nn.Module]:
        return [self.named_guide]

    def statistics(self) -> Statistics:
        return Means(["guide", "judge"], self._right)

    def statistics_identity(self) -> Hashable:
        assert self.features is not None
        return (type(self), self.label, self.features.identity())

    def _right(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        """Whether each sample's largest logit is its class's; none is of logits not finite."""
        conditions = samples.cond or {}
        if self.label not in conditions:
            raise FewstepError(
                f"ClassAccuracy compares with each sample's '{self.label}', which these samples "
                "were not given; leave it out of the Evaluation callback's `metrics`."
            )
        labels = conditions[self.label]
        return [correct(features[name], labels) for name in ("guide", "judge")]

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        means = generated.means()
        return {
            "guide_accuracy": means["guide"],
            "judge_accuracy": means["judge"],
            "guide_judge_gap": means["guide"] - means["judge"],
        }

    def protocol(self) -> dict[str, Any]:
        assert self.features is not None
        return {
            "metric": "class_accuracy",
            "label": self.label,
            "classifiers": self.features.protocol(),
        }
