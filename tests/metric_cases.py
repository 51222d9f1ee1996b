"""Samples for metrics, tiny random networks to look at them, and metrics over several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
)

from fewstep.metrics import Features, Metric, Ranks, Samples, Statistics, collect

from ranks import in_group, run_ranks
from tiny_pipelines import clip_tokenizer


class Flat(Features):
    """Samples as their own features and logits."""

    name = "flat"

    def prepare(self) -> None:
        pass

    def load(self, device: torch.device) -> None:
        pass

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        flat = samples.pixels.flatten(1)
        return {"features": flat, "logits_unbiased": flat}

    def protocol(self) -> dict[str, Any]:
        return {"name": self.name}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Pixels in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batches(
    pixels: Tensor,
    size: int = 3,
    prompts: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
) -> list[Samples]:
    """Samples numbered from zero, in batches, in an order of choice."""
    found = []
    for part in torch.tensor(order or range(len(pixels))).split(size):
        said = None if prompts is None else [prompts[number] for number in part.tolist()]
        found.append(Samples(pixels[part], part, said))
    return found


def measured(
    metric: Metric, generated: Sequence[Samples], reference: Sequence[Samples] | None = None
) -> dict[str, float]:
    """A loaded metric's values in one process."""
    sets = [None if s is None else collect([metric], s)[0] for s in (generated, reference)]
    assert sets[0] is not None
    return metric.compute(sets[0], sets[1])


def _rank_values(
    metric: Metric, generated: list[Samples], reference: list[Samples] | None
) -> dict[str, float] | None:
    ranks = Ranks()

    def mine(samples: list[Samples] | None) -> Statistics | None:
        if samples is None:
            return None
        return collect([metric], samples[ranks.rank :: ranks.size])[0].merged(ranks)

    ours, theirs = mine(generated), mine(reference)
    assert ours is not None
    return metric.compute(ours, theirs) if ranks.rank == 0 else None


def measured_by_ranks(
    metric: Metric, generated: list[Samples], reference: list[Samples] | None = None
) -> list[dict[str, float]]:
    """What those of two ranks say that compute, the first alone; both share the batches."""
    found = run_ranks(2, in_group, _rank_values, metric, generated, reference)
    assert [values is None for values in found] == [False, True]
    return [found[0]]


def random_weights(network: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Weights large enough that different pictures look different."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            size = scale / parameter[0].numel() ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * size


def save_clip(folder: Path, side: int = 32) -> Path:
    """A CLIP of 16 features that reads letters, 12 of them at most."""
    config = CLIPConfig(
        text_config={
            "vocab_size": 54,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "bos_token_id": 52,
            "eos_token_id": 53,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    random_weights(model, seed=2)  # the mean cosine of noise and words is above zero
    model.save_pretrained(folder)
    clip_tokenizer(folder / "made").save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return folder


def save_video_mae(folder: Path, fine_tuned: bool = False) -> Path:
    """A VideoMAE of 16 features for clips of 16 frames of 32 x 32."""
    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = (VideoMAEForVideoClassification if fine_tuned else VideoMAEModel)(config)
    random_weights(model)
    model.save_pretrained(folder)
    VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
