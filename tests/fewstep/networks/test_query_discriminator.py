from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion import Backbone, Cond, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT, RingMixture, VideoDiT
from fewstep.networks.pipelines import load_denoiser_of
from fewstep.networks.query_discriminator import (
    QueryDiscriminator,
    QueryHead,
    as_tokens,
    scaled_depths,
)

from tiny_transformers import SAVES

VIDEO = {"modelscope": (16, 3), "animatediff": (16, 3), "wan": (16, 5), "ltx": (32, 9)}
"""Side and frames of the tiny clips; images have a side of 16."""


def awake(backbone: Backbone) -> Backbone:
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return backbone


def dit(num_layers: int = 3) -> Backbone:
    torch.manual_seed(0)
    return awake(DiT(8, 1, num_layers=num_layers, num_heads=2, head_dim=8))


def labels(count: int) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(count) % 10}


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("blocks", "depths"),
    [(36, [16, 26, 36]), (30, [13, 22, 30]), (24, [11, 17, 24]), (57, [25, 41, 57]), (1, [1])],
)
def test_depths_are_the_published_ones_scaled_to_the_network(
    blocks: int, depths: list[int]
) -> None:
    assert scaled_depths(blocks) == depths


def test_blocks_are_counted_from_one_so_that_the_last_is_read() -> None:
    names = [f"transformer.transformer_blocks.{number}" for number in (15, 25, 35)]
    assert QueryDiscriminator(dit(36)).blocks == names


def test_a_block_that_is_not_there_is_named() -> None:
    with pytest.raises(FewstepError, match=r"no block 'transformer\.transformer_blocks\.9'"):
        QueryDiscriminator(dit(), ["transformer.transformer_blocks.9"])


def test_a_network_without_named_blocks_is_refused() -> None:
    with pytest.raises(FewstepError, match="names no feature blocks"):
        QueryDiscriminator(Backbone())


def test_frames_in_the_batch_become_tokens_of_their_sample() -> None:
    maps = torch.randn(2, 3, 4, 5, 6)  # clips, frames, channels, height, width
    tokens = as_tokens(maps.flatten(0, 1), 2)
    assert tokens.shape == (2, 3 * 5 * 6, 4)
    assert torch.equal(tokens[1, 2 * 30 + 6 + 1], maps[1, 2, :, 1, 1])
    assert torch.equal(as_tokens(maps.transpose(1, 2), 2), tokens)


# ---------------------------------------------------------------------- a head


def test_a_head_does_not_care_for_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    head, tokens = QueryHead(24), torch.randn(2, 7, 24)
    shuffled = tokens[:, torch.randperm(7)]
    torch.testing.assert_close(head(shuffled), head(tokens))


def test_padding_does_not_change_what_a_head_reads() -> None:
    torch.manual_seed(0)
    head, tokens = QueryHead(24), torch.randn(2, 7, 24)
    padded = torch.cat([tokens, 100 * torch.randn(2, 4, 24)], dim=1)
    valid = (torch.arange(11) < 7).expand(2, -1)
    torch.testing.assert_close(head(padded, valid), head(tokens))
    assert not torch.allclose(head(padded), head(tokens), atol=1e-3)


class Padded(DiT):
    """Tells that the last tokens of each sample are padding."""

    kept = 10

    def token_mask(self, x_t: Tensor, cond: Cond) -> Tensor | None:
        return (torch.arange(16) < self.kept).expand(len(x_t), -1)


def test_the_mask_of_a_padded_batch_reaches_the_heads() -> None:
    torch.manual_seed(0)
    whole = QueryDiscriminator(awake(Padded(8, 1, num_layers=3, num_heads=2, head_dim=8)))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 700.0])
    seen: list[Tensor] = []
    whole.heads[0].register_forward_pre_hook(lambda _module, given: seen.append(given[1]))
    whole(x, t, labels(2))
    assert seen[0].sum(1).tolist() == [10, 10]


# ---------------------------------------------------------------------- the whole


@pytest.mark.parametrize("kind", ["dit", "video", "ring"])
def test_a_samples_logit_does_not_depend_on_its_batch(kind: str) -> None:
    torch.manual_seed(0)
    networks = {
        "dit": lambda: (dit(), (1, 8, 8)),
        "video": lambda: (
            awake(VideoDiT(8, 3, 1, patch_size=4, num_layers=3, num_heads=2, head_dim=12)),
            (1, 3, 8, 8),
        ),
        "ring": lambda: (awake(RingMixture(VPSchedule(), width=24)), (2,)),
    }
    network, shape = networks[kind]()
    discriminator = QueryDiscriminator(network)
    x, t = torch.randn(5, *shape), torch.linspace(0, 999, 5)
    logits = discriminator(x, t, labels(5))
    assert logits.shape == (5,)
    alone = discriminator(x[2:3], t[2:3], {"class_labels": torch.tensor([2])})
    torch.testing.assert_close(alone, logits[2:3])
    for other in (x.flip(0), t.flip(0)):
        given = (other, t) if other.shape == x.shape else (x, other)
        assert not torch.allclose(discriminator(*given, labels(5)), logits, atol=1e-4)
    told = {"class_labels": torch.arange(5) + 1}
    assert not torch.allclose(discriminator(x, t, told), logits, atol=1e-4)


def test_every_parameter_has_a_gradient_and_that_of_the_unread_output_is_zero() -> None:
    discriminator = QueryDiscriminator(dit())
    discriminator(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 700.0]), labels(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    out = discriminator.backbone.get_submodule("transformer.proj_out_2")
    inlet = discriminator.backbone.get_submodule("transformer.pos_embed.proj")
    assert not any(parameter.grad.any() for parameter in out.parameters())
    assert all(parameter.grad.any() for parameter in inlet.parameters())


def test_the_networks_own_weights_are_taken_over_and_its_dropout_is_off() -> None:
    network = dit()
    before = copy.deepcopy(network.state_dict())
    discriminator = QueryDiscriminator(network).train()
    found = discriminator.backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert all(m.p == 0 for m in discriminator.modules() if isinstance(m, nn.Dropout))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 700.0])
    assert torch.equal(discriminator(x, t, labels(2)), discriminator(x, t, labels(2)))


def test_heads_stay_in_float32_within_autocast() -> None:
    discriminator = QueryDiscriminator(dit())
    seen: list[torch.dtype] = []
    for head in discriminator.heads:
        head.register_forward_hook(lambda _module, _given, found: seen.append(found.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 700.0]), labels(2))
    assert seen == [torch.float32] * 3
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("wide", "low", "high"), [(True, 0.8, 1.25), (False, 1.3, 9.0)])
def test_in_autocast_a_small_perturbation_is_told_from_rounding(
    wide: bool, low: float, high: float
) -> None:
    """Mean squared differences of logits, in bfloat16 over those in float32."""
    torch.manual_seed(0)
    network = awake(DiT(8, 1, num_layers=4, num_heads=4, head_dim=24))
    discriminator = QueryDiscriminator(network, wide=wide)
    x, t = torch.randn(192, 1, 8, 8), 999 * torch.rand(192)
    both = torch.cat([x, x + 0.01 * torch.randn_like(x)])
    cond = {"class_labels": (torch.arange(192) % 10).repeat(2)}

    def difference(low_precision: bool) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            clean, moved = discriminator(both, t.repeat(2), cond).chunk(2)
        return float((clean - moved).square().mean())

    assert low < difference(True) / difference(False) < high


def test_flash_attention_serves_but_cannot_be_differentiated_twice() -> None:
    """Why the penalty of the published recipe is a difference."""
    discriminator = QueryDiscriminator(dit())
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        logits = discriminator(x, torch.tensor([5.0, 700.0]), labels(2))
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="flash_attention"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("name", SAVES)
def test_a_family_becomes_a_discriminator(tmp_path: Path, name: str) -> None:
    side, frames = VIDEO.get(name, (16, None))
    torch.manual_seed(0)
    backbone = load_denoiser_of(SAVES[name](tmp_path), (side, side), frames).denoiser.backbone
    discriminator = QueryDiscriminator(backbone.requires_grad_(True))
    if name == "dit":
        cond = {"class_labels": torch.tensor([1, 2, 3])}
    else:
        texts = backbone.text_shapes
        cond = {key: torch.randn(3, *shape) for key, shape in texts.items()}
        cond = {k: c.abs() > 0 if "mask" in k else c for k, c in cond.items()}
    x = torch.randn(3, *backbone.sample_shape, requires_grad=True)
    t = torch.tensor([10.0, 300.0, 900.0])
    logits = discriminator(x, t, cond)
    assert logits.shape == (3,)
    logits[1].backward()
    assert x.grad is not None
    assert x.grad[1].any()
    assert not x.grad[0].any()
    assert not x.grad[2].any()
    heads = [head.token.grad for head in discriminator.heads]
    assert all(gradient is not None and gradient.any() for gradient in heads)
