"""Features of a small digit classifier: what stands in for Inception on 8 x 8 digits.

Distances over these features are *not* FIDs and are named for what they are. The classifier is
trained on first use in a few seconds and cached; its hash is part of every result's protocol.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Features, Samples, to_uint8
from fewstep.seeding import torch_generator

logger = logging.getLogger(__name__)

NUM_FEATURES = 64
NUM_EPOCHS = 15
FULL_SET = 1797
FILE_NAME = "digit_classifier_v1.safetensors"


class DigitClassifier(nn.Module):
    """Convolutional classifier of 8 x 8 digits, ``(B, 1, 8, 8)`` in [-1, 1] to ``(B, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, NUM_FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations ``(B, 64)``."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Class logits ``(B, 10)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def digits() -> tuple[Tensor, Tensor]:
    """All digits ``(1797, 1, 8, 8)`` in [-1, 1], and their labels."""
    data = load_digits()
    # The same 8-bit rounding as the shards hold.
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1
    return images, torch.from_numpy(data.target).long()


def train_classifier(seed: int = 0) -> DigitClassifier:
    """Trains on all 1,797 digits with a little noise, in a few seconds on a CPU."""
    generator = torch_generator(seed, "digit-classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
    fit_classifier(classifier, *digits(), generator)
    return classifier.eval()


@torch.enable_grad()  # evaluations run without
def fit_classifier(
    classifier: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> None:
    """Trains a classifier on images ``(N, 1, 8, 8)`` in [-1, 1] and labels ``(N,)``."""
    epochs = NUM_EPOCHS * max(1, round(FULL_SET / len(images)))  # as many updates for a part
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(128)[:-1]:
            batch = images[rows] + 0.1 * torch.randn(len(rows), 1, 8, 8, generator=generator)
            loss = F.cross_entropy(classifier(batch), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def store_classifier(classifier: nn.Module, path: Path) -> None:
    """Writes a classifier's weights; nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file(classifier.state_dict(), partial)
    partial.replace(path)


def fetch_classifier(classifier: nn.Module, path: Path) -> None:
    """Reads a classifier's weights.

    Raises:
        FewstepError: if the cached file is damaged.
    """
    try:
        classifier.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own, undocumented, types
        raise FewstepError(
            f"The cached digit classifier '{path}' cannot be read ({error}). Delete the "
            "file; it is trained again in a few seconds."
        ) from error
    classifier.requires_grad_(False).eval()


def cache_folder(cache: str | None) -> Path:
    """Where trained classifiers are kept; ``$FEWSTEP_CACHE`` or ``~/.cache/fewstep`` by default."""
    default = os.environ.get("FEWSTEP_CACHE", "~/.cache/fewstep")
    return Path(cache or default).expanduser()


class DigitClassifierFeatures(Features):
    """Penultimate features of the digit classifier, of pixels rounded to 8 bits.

    Args:
        cache: folder of the trained classifier; ``$FEWSTEP_CACHE`` or ``~/.cache/fewstep`` by
            default.
    """

    name = "digit_classifier"

    def __init__(self, cache: str | None = None) -> None:
        self.path = cache_folder(cache) / FILE_NAME
        self.network: DigitClassifier | None = None

    def prepare(self) -> None:
        """Trains and caches the classifier unless it is there."""
        if self.path.exists():
            return
        logger.info("Training the digit classifier that metrics look through (once) ...")
        store_classifier(train_classifier(), self.path)

    def load(self, device: torch.device) -> None:
        """Loads the cached classifier.

        Raises:
            FewstepError: if the cached file is damaged.
        """
        network = DigitClassifier()
        fetch_classifier(network, self.path)
        self.network = network.to(device)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def identity(self) -> Hashable:
        return (type(self), self.path)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        assert self.network is not None, "load() comes first"
        pixels = to_uint8(samples.pixels).float() / 127.5 - 1
        with full_float32(pixels.device):
            return {"features": self.network.features(pixels)}

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dimensions": NUM_FEATURES,
            "weights_sha256": self.sha256,
            "pixels": "8-bit",
        }
