"""The first weights of transformers with adaLN-Zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def start_as_dit(
    network: nn.Module, embeddings: Iterable[nn.Module], init_std: float = 0.02
) -> None:
    """Draws a network's weights anew as DiT's code does (Peebles & Xie 2023, arXiv 2212.09748).

    Linear layers, that of the patches among them, by Xavier's uniform rule with biases of zero, and
    embeddings of time and class from a normal distribution.

    Args:
        network: whose linear and convolutional layers all are drawn.
        embeddings: modules whose layers and tables embed time and class.
        init_std: those embeddings' standard deviation.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedding in embeddings:
        for module in embedding.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)


def start_at_zero(*layers: nn.Linear) -> None:
    """Sets weights and biases of modulations and outputs to zero."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
