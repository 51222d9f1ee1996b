"""What transformers with adaLN-Zero start as."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewstep.networks import DiT, Latte

ZEROS = {
    DiT: ("norm1.linear", "proj_out_1", "proj_out_2"),
    Latte: ("modulation", "out_modulation", "out"),
}
EMBEDDINGS = {
    DiT: ("linear_1", "linear_2", "embedding_table"),
    Latte: ("linear_1", "linear_2", "class_embed"),
}


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    if kind is DiT:
        return DiT(8, 3, num_layers=2, num_heads=2, head_dim=48, num_classes=50, init_std=0.02)
    return Latte(8, 3, 3, num_layers=2, num_heads=2, head_dim=48, num_classes=50)


@pytest.mark.parametrize("kind", [DiT, Latte])
def test_all_weights_are_drawn_as_those_of_dit(kind: type[nn.Module]) -> None:
    seen = set()
    for name, module in made(kind).named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            continue
        weight = module.weight.detach().flatten(1)
        if name.endswith(ZEROS[kind]):
            seen.add("zero")
            assert not weight.any(), name
        elif name.endswith(EMBEDDINGS[kind]):
            seen.add("normal")
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert weight.abs().max() > 0.05, name
        else:
            seen.add("uniform")
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.95 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        bias = getattr(module, "bias", None)
        assert bias is None or not bias.any(), name
    assert seen == {"zero", "normal", "uniform"}
