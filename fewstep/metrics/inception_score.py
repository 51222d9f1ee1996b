"""Inception Score: are single images clearly of one class, and all together of many?"""

from __future__ import annotations

import itertools
import logging
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.base import Better, Features, Metric, Reference, Statistics
from fewstep.metrics.inception import InceptionFeatures, value_name
from fewstep.metrics.rows import Rows
from fewstep.metrics.vectors import Vectors

logger = logging.getLogger(__name__)

LOGITS = "logits_unbiased"


def inception_score(logits: Tensor) -> Tensor:
    """``exp E KL(p(y | x) || p(y))`` of logits ``(N, K)``, where ``p(y)`` is the samples' own."""
    log_each = logits.log_softmax(1)
    each = log_each.exp()
    # log p(y) of the mean may be of a zero that underflowed; there every p(y | x) is zero too.
    log_all = each.mean(0, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny).log()
    return (each * (log_each - log_all)).sum(1).mean().exp()


class InceptionScore(Metric):
    """Inception Score (Salimans et al., NeurIPS 2016): ``inception_score`` and its ``_std``.

    Mean and spread over parts of the set, which are shuffled as torch-fidelity does, so that
    equal features give equal values. It never looks at real images and says little about data
    that is unlike ImageNet.

    Args:
        features: Inception; torch-fidelity's resize by default.
        splits: parts.
        seed: of the shuffling.
    """

    reference: ClassVar[Reference] = "none"

    def __init__(
        self, features: InceptionFeatures | None = None, splits: int = 10, seed: int = 2020
    ) -> None:
        self.features: Features = features or InceptionFeatures()
        self.splits = splits
        self.seed = seed
        self.name = value_name("inception_score", self.features)
        self.better: dict[str, Better] = {self.name: "higher", f"{self.name}_std": "lower"}
        if splits < 1:
            raise FewstepError("An Inception Score takes at least one part ('splits').")

    def statistics(self) -> Vectors:
        return Vectors([LOGITS])

    def check(self, num_samples: int) -> None:
        if num_samples < self.splits:
            raise FewstepError(self._too_few(num_samples))

    def _too_few(self, count: int) -> str:
        return (
            f"{self.name} takes at least one sample for each of its {self.splits} parts, but "
            f"there are {count}. Measure more samples, or lower its 'splits'."
        )

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        logits = generated[LOGITS]
        count, classes = logits.shape
        if count < self.splits:
            raise FewstepError(self._too_few(count))
        if count < self.splits * classes:
            logger.warning(
                "%s of %d samples: each of its %d parts has fewer than there are classes (%d), "
                "which makes the score too small. Compare it with nothing of another size.",
                self.name,
                count,
                self.splits,
                classes,
            )
        order = np.random.RandomState(self.seed).permutation(count)
        edges = [part * count // self.splits for part in range(self.splits + 1)]
        parts = [logits[order[a:b]].double() for a, b in itertools.pairwise(edges)]
        scores = torch.stack([inception_score(part) for part in parts])
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        return {self.name: mean, f"{self.name}_std": std}

    def protocol(self) -> dict[str, Any]:
        return {
            "metric": self.name,
            "splits": self.splits,
            "seed": self.seed,
            "output": LOGITS,
            "features": self.features.protocol(),
        }
