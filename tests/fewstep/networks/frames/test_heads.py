from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.losses import (
    hinge_discriminator,
    hinge_generator,
    one_centred_penalty,
)
from fewstep.errors import FewstepError
from fewstep.networks.frames import FrameDiscriminator
from fewstep.networks.frames.heads import LocalBatchNorm, SpectralConv1d
from scripts.plan.roles import parameters_on_meta

CHANNELS = [16, 8]
LENGTHS = [12, 5]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0) -> list[Tensor]:
    return [
        randn(count, length, channels, seed=seed + number)
        for number, (channels, length) in enumerate(zip(CHANNELS, LENGTHS, strict=True))
    ]


def condition(count: int) -> Tensor:
    return randn(count, 6, seed=7)


def heads(cond_dim: int = 6, **options: Any) -> FrameDiscriminator:
    torch.manual_seed(0)
    return FrameDiscriminator(CHANNELS, cond_dim, **{"width": 4, **options})


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- sizes and formulas


@pytest.mark.parametrize("normalisation", ["group", "local_batch"])
def test_the_published_heads_have_the_published_size(normalisation: Any) -> None:
    with parameters_on_meta():
        found = FrameDiscriminator([384] * 4, cond_dim=1024, normalisation=normalisation)
    assert [sum(p.numel() for p in head.parameters()) for head in found.heads] == [1_567_104] * 4
    assert sum(p.numel() for p in found.parameters()) == 6_268_416


def test_a_head_has_its_formula() -> None:
    found, features, cond = heads(), tokens(3), condition(3)
    scores = found.levels(features, cond)
    for number, head in enumerate(found.heads):
        x = features[number].mT

        def block(x: Tensor, layers: Any) -> Tensor:
            conv, norm = layers[0], layers[1]
            left, rows = conv.left, conv.weight.flatten(1)
            weight = conv.weight / (left @ rows @ conv.right)
            reach = conv.kernel_size[0] // 2
            ring = x.repeat(1, 1, 5)  # many times round
            y = F.conv1d(ring, weight, conv.bias, padding=reach)
            y = y[..., 2 * x.shape[-1] : 3 * x.shape[-1]]
            y = F.group_norm(y, norm.num_groups, norm.weight, norm.bias)
            return torch.where(y > 0, y, 0.2 * y)

        head_: Any = head
        h = block(x, head_.inlet)
        h = (block(h, head_.residual) + h) / math.sqrt(2)
        out = F.conv1d(h, head_.outlet.normalised_weight(), head_.outlet.bias)
        direction = cond @ head_.condition.weight.T + head_.condition.bias
        expected = torch.einsum("ncl,nc->nl", out, direction) / 2  # of the root of width 4
        torch.testing.assert_close(scores[number], expected)


def test_all_tokens_of_all_levels_are_scored() -> None:
    found, features, cond = heads(), tokens(3), condition(3)
    scores = found.score(features, cond)
    assert scores.shape == (3, sum(LENGTHS))
    assert torch.equal(scores, torch.cat(found.levels(features, cond), 1))
    assert torch.equal(scores, found(features, cond))


def test_heads_without_a_condition_have_one_number_a_token() -> None:
    found = heads(cond_dim=0)
    assert found.score(tokens(3)).shape == (3, sum(LENGTHS))
    assert not any("condition" in name for name in found.state_dict())
    assert [tuple(head.outlet.weight.shape) for head in found.heads] == [  # type: ignore[union-attr]
        (1, 16, 1),
        (1, 8, 1),
    ]


def test_levels_are_judged_apart() -> None:
    found, cond = heads(), condition(2)
    first, second = tokens(2), tokens(2, seed=5)
    mixed = found.levels([first[0], second[1]], cond)
    torch.testing.assert_close(mixed[0], found.levels(first, cond)[0])
    torch.testing.assert_close(mixed[1], found.levels(second, cond)[1])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 20])
def test_the_row_of_tokens_is_a_ring_however_short(length: int) -> None:
    found = heads(cond_dim=0)
    features = [randn(2, length, channels) for channels in CHANNELS]
    scores = found.levels(features)
    turned = found.levels([level.roll(1, dims=1) for level in features])
    for score, other in zip(scores, turned, strict=True):
        torch.testing.assert_close(score.roll(1, dims=1), other)
    if length > 1:
        assert scores[0].std() > 0


def test_a_single_token_and_a_channels_mean_are_seen() -> None:
    torch.manual_seed(0)
    found = FrameDiscriminator([32], width=4)
    few, shift = randn(2, 1, 32), torch.zeros(32).index_fill(0, torch.tensor([3]), 1.0)
    scores = found.score([few])
    assert (scores - found.score([few + shift])).abs().min() > 1e-3
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_the_condition_changes_scores_in_proportion() -> None:
    found, features = heads(), tokens(2)
    zero, one = torch.zeros(2, 6), condition(2)
    bias, slope = (found.score(features, c) for c in (zero, one))
    torch.testing.assert_close(
        found.score(features, 3 * one), bias + 3 * (slope - bias), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("given", "message"), [(None, "there is none"), (torch.zeros(2, 5), "there are 5")]
)
def test_a_missing_or_other_condition_is_refused(given: Tensor | None, message: str) -> None:
    with pytest.raises(FewstepError, match=rf"condition of 6 numbers a frame, and {message}"):
        heads().score(tokens(2), given)


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(FewstepError, match="odd, not 8"):
        heads(kernel=8)
    with pytest.raises(FewstepError, match="group or local_batch, not 'batch'"):
        heads(normalisation="batch")


# ---------------------------------------------------------------------- the spectral norm


def spectral_norm(layer: SpectralConv1d) -> Tensor:
    return torch.linalg.matrix_norm(layer.normalised_weight().detach().flatten(1), 2)


def test_the_largest_singular_value_becomes_one() -> None:
    torch.manual_seed(0)
    layer = SpectralConv1d(8, 6, 9)
    assert 0.97 < float(spectral_norm(layer)) < 1.03
    layer.advance(200)
    assert float(spectral_norm(layer)) == pytest.approx(1, abs=1e-4)


def test_advancing_follows_a_weight_that_changes() -> None:
    torch.manual_seed(0)
    layer = SpectralConv1d(8, 6)
    before = layer.normalised_weight()
    with torch.no_grad():
        layer.weight.copy_(randn(6, 8, 1, seed=3))
    for _ in range(200):
        layer.advance()
    assert float(spectral_norm(layer)) == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(before, layer.normalised_weight())


def test_the_gradient_is_that_of_torchs_spectral_norm() -> None:
    torch.manual_seed(0)
    ours, plain = SpectralConv1d(8, 6, 3), nn.Conv1d(8, 6, 3)
    plain.load_state_dict({"weight": ours.weight.detach(), "bias": ours.bias.detach()})  # type: ignore[union-attr]
    theirs: Any = nn.utils.parametrizations.spectral_norm(plain).eval()  # which does not move on
    norm = theirs.parametrizations.weight[0]
    norm._u.copy_(ours.left)
    norm._v.copy_(ours.right)
    x = randn(2, 8, 10)
    middle = ours(x)[..., 1:-1]  # theirs has no ring
    torch.testing.assert_close(middle, theirs(x))
    middle.square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad)


def test_forward_passes_change_nothing() -> None:
    found, features, cond = heads().train(), tokens(3), condition(3)
    state = copy.deepcopy(found.state_dict())
    first = found.score(features, cond)
    assert torch.equal(first, found.score(features, cond))
    assert torch.equal(first, found.eval().score(features, cond))
    assert all(torch.equal(state[name], value) for name, value in found.state_dict().items())
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(1.1).add_(0.01)
    unmoved = found.score(features, cond)
    found.advance()
    assert not torch.equal(unmoved, found.score(features, cond))


def test_turns_of_generator_and_discriminator_share_graphs_of_one_function() -> None:
    found, cond = heads().train(), condition(3)
    fake = [level.requires_grad_() for level in tokens(3)]
    generator = hinge_generator([found.score(fake, cond)])
    real_scores = found.score(tokens(3, seed=9), cond)
    fake_scores = found.score([level.detach() for level in fake], cond)
    expected = torch.autograd.grad(generator, fake, retain_graph=True)
    found.advance()  # too early by the rules, and harmless to graphs that are there
    hinge_discriminator([real_scores], [fake_scores]).backward()
    assert all(map(torch.equal, expected, torch.autograd.grad(generator, fake)))
    assert all(parameter.grad is not None for parameter in found.parameters())


def test_copies_and_reloaded_heads_go_on_alike() -> None:
    found, features, cond = heads(), tokens(3), condition(3)
    found.advance()
    torch.manual_seed(5)
    loaded = FrameDiscriminator(CHANNELS, 6, width=4)
    loaded.load_state_dict(found.state_dict())
    others = [copy.deepcopy(found), loaded]
    for module in (found, *others):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.01)
        module.advance()
    for other in others:
        assert torch.equal(found.score(features, cond), other.score(features, cond))
        assert other.state_dict().keys() == found.state_dict().keys()
    assert sum("left" in name for name in found.state_dict()) == 6


# ---------------------------------------------------------------------- batches


def test_several_small_batches_make_the_gradient_of_one() -> None:
    found, real, fake, cond = heads(), tokens(6), tokens(6, seed=4), condition(6)

    def loss(rows: slice) -> Tensor:
        scores = [found.score([f[rows] for f in side], cond[rows]) for side in (real, fake)]
        return hinge_discriminator(scores[:1], scores[1:])

    loss(slice(None)).backward()
    whole = gradients(found)
    found.zero_grad()
    for start in (0, 2, 4):
        (loss(slice(start, start + 2)) / 3).backward()
    assert whole.keys() == dict(found.named_parameters()).keys()
    for name, gradient in gradients(found).items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4)


def test_scores_depend_on_no_other_sample() -> None:
    found, features, cond = heads(), tokens(5), condition(5)
    scores = found.score(features, cond)
    alone = found.score([level[2:3] for level in features], cond[2:3])
    torch.testing.assert_close(scores[2:3], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 16, 17])
def test_local_batches_of_any_size_run(count: int) -> None:
    found = heads(normalisation="local_batch")
    scores = found.score(tokens(count), condition(count))
    assert scores.shape == (count, sum(LENGTHS))
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("count", "groups"), [(1, [1]), (6, [6]), (8, [8]), (16, [8, 8]), (9, [5, 4])]
)
def test_local_batches_are_groups_of_up_to_eight(count: int, groups: list[int]) -> None:
    norm, x = LocalBatchNorm(3), randn(count, 3, 7)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    weight, bias = norm.weight[:, 0], norm.bias[:, 0]
    expected = [F.batch_norm(g, None, None, weight, bias, training=True) for g in x.split(groups)]
    torch.testing.assert_close(norm(x), torch.cat(expected))
    assert torch.equal(norm.train()(x), norm.eval()(x))


# ---------------------------------------------------------------------- precision and learning


@pytest.mark.parametrize("normalisation", ["group", "local_batch"])
def test_low_precision_passes_are_close_and_weights_are_normalised_in_full(
    normalisation: Any,
) -> None:
    found, features, cond = heads(normalisation=normalisation), tokens(4), condition(4)
    exact = found.score(features, cond)
    half = [level.bfloat16() for level in features]
    assert found.score(half, cond.bfloat16()).dtype == torch.float32
    layer = found.heads[0].outlet
    expected: Tensor = layer.normalised_weight()  # type: ignore[operator, union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.normalised_weight(), expected)  # type: ignore[operator, union-attr]
        low = found.score(half, cond)
    torch.testing.assert_close(low.float(), exact, atol=0.1, rtol=0.1)


def test_heads_compile_as_a_whole() -> None:
    found, features, cond = heads(), tokens(3), condition(3)
    compiled = torch.compile(found, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, cond), found.score(features, cond))
    found.zero_grad()
    compiled(features, cond).square().mean().backward()
    got = gradients(found)
    found.zero_grad()
    found.score(features, cond).square().mean().backward()
    torch.testing.assert_close(got, gradients(found))


def test_the_penalty_trains_the_heads() -> None:
    found, cond = heads(), condition(3)
    leaves = [level.requires_grad_() for level in tokens(3)]
    penalty = one_centred_penalty(leaves, [found.score(leaves, cond)])
    penalty.backward(inputs=list(found.parameters()))
    assert all(leaf.grad is None for leaf in leaves)
    weights = [m.weight for m in found.modules() if isinstance(m, SpectralConv1d)]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


def test_heads_learn_to_tell_two_sets_apart() -> None:
    found, cond = heads(), condition(16)
    real, fake = tokens(16), [level + 0.5 for level in tokens(16, seed=3)]
    optimizer = torch.optim.Adam(found.parameters(), lr=3e-3)
    for _ in range(80):
        loss = hinge_discriminator([found.score(real, cond)], [found.score(fake, cond)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.advance()
    assert float(loss.detach()) < 1
