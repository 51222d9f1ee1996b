"""The first weights of transformers with adaLN-Zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

EMBEDDING_STD = 0.02


@torch.no_grad()
def start_as_dit(
    network: nn.Module, embeddings: Iterable[nn.Module], zeros: Iterable[nn.Linear]
) -> None:
    """Draws a network's weights anew as DiT's are (Peebles & Xie 2023, arXiv 2212.09748).

    The paper names what starts at zero, its code the rest: linear layers, that of the patches among
    them, by Xavier's uniform rule with biases of zero, and embeddings of time and class from
    ``N(0, 0.02^2)``.

    Args:
        network: whose linear and convolutional layers all are drawn.
        embeddings: modules whose layers and tables embed time and class.
        zeros: modulations and the output, which are zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedding in embeddings:
        for module in embedding.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
    for linear in zeros:
        nn.init.zeros_(linear.weight)
