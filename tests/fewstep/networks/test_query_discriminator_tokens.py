"""Which tokens a query discriminator's logit depends on: a sample's own, in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone, Cond
from fewstep.networks import DiT
from fewstep.networks.pipelines import load_denoiser_of
from fewstep.networks.query_discriminator import QueryDiscriminator

from tiny_transformers import SAVES

Change = Callable[[Tensor], Tensor]


def noise_like(values: Tensor) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------------- their order


def dit() -> QueryDiscriminator:
    torch.manual_seed(0)
    network = DiT(8, 1, num_layers=3, num_heads=2, head_dim=8)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return QueryDiscriminator(network)


def logits_of_digits(discriminator: QueryDiscriminator, change: Change | None = None) -> Tensor:
    """Logits of four samples, of whose tokens the heads are given something else."""

    def changed(_module: nn.Module, given: tuple[Tensor, Tensor | None]) -> Any:
        return (change(given[0]), *given[1:]) if change else None

    handles = [head.register_forward_pre_hook(changed) for head in discriminator.heads]
    x, t = noise_like(torch.empty(4, 1, 8, 8)), torch.tensor([5.0, 200.0, 600.0, 900.0])
    with torch.no_grad():
        logits: Tensor = discriminator(x, t, {"class_labels": torch.arange(4)})
    for handle in handles:
        handle.remove()
    return logits


def test_the_order_of_tokens_behind_the_blocks_does_not_matter() -> None:
    discriminator = dit()
    wanted = logits_of_digits(discriminator)
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of_digits(discriminator, lambda x: x[:, shuffle]), wanted)


def test_another_samples_tokens_do_not_matter_and_each_of_its_own_does() -> None:
    discriminator = dit()
    wanted = logits_of_digits(discriminator)
    for token in range(16):

        def one(tokens: Tensor, token: int = token) -> Tensor:
            tokens = tokens.clone()
            tokens[2, token] = 5 * noise_like(tokens[2, token])
            return tokens

        change = (logits_of_digits(discriminator, one) - wanted).abs()
        assert change[2] > 1e-5
        assert change[[0, 1, 3]].max() < 1e-6


# ---------------------------------------------------------------------- text


def joint(tmp_path: Path, name: str) -> tuple[Backbone, dict[str, Tensor], dict[str, Tensor]]:
    """A transformer in which text and sample share the blocks, what it is given, and its text."""
    torch.manual_seed(0)
    backbone: Any = load_denoiser_of(SAVES[name](tmp_path), (16, 16)).denoiser.backbone
    text = {key: torch.randn(3, *shape) for key, shape in backbone.text_shapes.items()}
    t = torch.tensor([10.0, 300.0, 900.0])
    return backbone, {"x": torch.randn(3, *backbone.sample_shape), "t": t}, text


def logits_with_another(
    stream: int | None, block: str, discriminator: QueryDiscriminator, *given: Any
) -> Tensor:
    """Logits where a block returns noise as its text's (0) or its sample's (1) tokens."""
    inputs, text = given

    def replaced(_module: nn.Module, _inputs: Any, output: tuple[Tensor | None, Tensor]) -> Any:
        streams = list(output)
        if stream is not None:
            found = streams[stream]  # None for text that no later block would take
            streams[stream] = noise_like(output[1] if found is None else found)
        return tuple(streams)

    handle = discriminator.backbone.get_submodule(block).register_forward_hook(replaced)
    with torch.no_grad():
        logits: Tensor = discriminator(inputs["x"], inputs["t"], text)
    handle.remove()
    return logits


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_text_is_not_read_where_it_leaves_a_block(tmp_path: Path, name: str) -> None:
    """It counts only by what later blocks make of it."""
    backbone, *given = joint(tmp_path, name)
    first, last = backbone.feature_blocks
    alone = QueryDiscriminator(backbone, [first])
    wanted = logits_with_another(None, first, alone, *given)
    assert torch.equal(logits_with_another(0, first, alone, *given), wanted)
    assert not torch.allclose(logits_with_another(1, first, alone, *given), wanted, atol=1e-3)
    both = QueryDiscriminator(backbone)
    assert both.blocks == [first, last]
    wanted = logits_with_another(None, last, both, *given)
    assert torch.equal(logits_with_another(0, last, both, *given), wanted)
    assert not torch.allclose(logits_with_another(0, first, both, *given), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_heads_are_given_as_many_tokens_as_a_sample_has_patches(tmp_path: Path, name: str) -> None:
    backbone, inputs, text = joint(tmp_path, name)
    discriminator, seen = QueryDiscriminator(backbone), []
    for head in discriminator.heads:
        head.register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape[1]))
    discriminator(inputs["x"], inputs["t"], text)
    height, width = backbone.sample_shape[-2:]
    assert seen == [height * width // 4] * 2


# ---------------------------------------------------------------------- padding


class Points(Backbone):
    """Of lists of points ``(B, N, 4)``, each point for itself; short ones are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = nn.Linear(4, 24), nn.Linear(24, 4)

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {"block": 24}

    def token_mask(self, x_t: Tensor, cond: Cond) -> Tensor | None:
        return torch.arange(x_t.shape[1]) < cond["count"][:, None]

    def forward(self, x_t: Tensor, t: Tensor, count: Tensor) -> Tensor:
        found: Tensor = self.out(self.block(x_t) * (1 + t[:, None, None] / 1000))
        return found


@pytest.mark.parametrize("length", [7, 12])
def test_a_padded_samples_logit_is_that_of_the_sample_alone(length: int) -> None:
    """However long the others of its batch are, and whatever the padding is."""
    torch.manual_seed(0)
    discriminator, counts = QueryDiscriminator(Points()), [3, 7, 5]
    t = torch.tensor([10.0, 300.0, 900.0])
    points = [torch.randn(count, 4) for count in counts]
    padded = 100 * torch.randn(3, length, 4)
    for row, own in enumerate(points):
        padded[row, : len(own)] = own
    together = discriminator(padded, t, {"count": torch.tensor(counts)})
    for row, own in enumerate(points):
        alone = discriminator(own[None], t[row : row + 1], {"count": torch.tensor([len(own)])})
        torch.testing.assert_close(together[row : row + 1], alone)
    unmasked = discriminator(padded, t, {"count": torch.full((3,), length)})
    assert (unmasked - together)[[0, 2]].abs().min() > 1e-3
