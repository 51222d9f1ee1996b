from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone, Cond, Denoiser, VPSchedule
from fewstep.diffusion.losses import hinge_discriminator, hinge_generator
from fewstep.errors import FewstepError
from fewstep.networks import DiT, FeatureDiscriminator, RingMixture
from fewstep.networks.discriminator import Head, as_map, tapped


class Down(nn.Module):
    """A U-Net's down block: returns its output and its skips, as diffusers' blocks do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = self.conv(x).tanh()
        return hidden, (x, hidden)


class TinyUNet(Backbone):
    """Two resolutions, and a tuple from one of its blocks."""

    sample_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.config = {}
        self.down = Down(1, 4)
        self.mid = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 1, 2, stride=2)

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {"down": 4, "mid": 6}

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return dict(cond)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        hidden, _ = self.down(x_t)
        return self.up(self.mid(hidden)) * t[:, None, None, None]


def dit() -> DiT:
    return DiT(sample_size=8, channels=1, num_layers=3, num_heads=2, head_dim=8)


def frozen(network: Backbone) -> Denoiser:
    return Denoiser(network, VPSchedule(), "epsilon").requires_grad_(False).eval()


def setting(kind: str) -> tuple[Denoiser, Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    t, labels = torch.tensor([900.0, 10.0]), {"class_labels": torch.tensor([1, 4])}
    if kind == "dit":
        return frozen(dit()), torch.randn(2, 1, 8, 8), t, labels
    if kind == "unet":
        return frozen(TinyUNet()), torch.randn(2, 1, 8, 8), t, {}
    return frozen(RingMixture(VPSchedule(), width=24)), torch.randn(2, 2), t, labels


SHAPES = {
    "dit": [(2, 16, 4, 4)] * 3,
    "unet": [(2, 4, 4, 4), (2, 6, 4, 4)],
    "ring": [(2, 24, 1, 1)] * 2,
}


@pytest.mark.parametrize("kind", SHAPES)
def test_features_are_the_outputs_of_the_named_blocks(kind: str) -> None:
    denoiser, x, t, cond = setting(kind)
    discriminator = FeatureDiscriminator(denoiser.backbone)
    features = discriminator.features(denoiser, x, t, cond)
    assert [tuple(f.shape) for f in features] == SHAPES[kind]

    seen: list[Tensor] = []
    for name in discriminator.blocks:
        module = denoiser.backbone.get_submodule(name)
        module.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    denoiser(x, t, cond)
    for feature, output in zip(features, seen, strict=True):
        channels = feature.shape[1]
        flat = feature.permute(0, 2, 3, 1).reshape(-1, channels)
        channels_last = output.movedim(1, -1) if kind == "unet" else output
        torch.testing.assert_close(flat, channels_last.reshape(-1, channels))


@pytest.mark.parametrize("kind", SHAPES)
def test_there_is_a_score_map_a_head(kind: str) -> None:
    denoiser, x, t, cond = setting(kind)
    discriminator = FeatureDiscriminator(denoiser.backbone, heads_per_block=2, width=16)
    scores = discriminator(denoiser, x, t, cond)
    expected = [(2, 1, *shape[2:]) for shape in SHAPES[kind] for _ in range(2)]
    assert [tuple(score.shape) for score in scores] == expected
    again = discriminator.score(discriminator.features(denoiser, x, t, cond))
    assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))


def test_scores_depend_on_sample_time_and_condition() -> None:
    denoiser, x, t, cond = setting("dit")
    with torch.no_grad():  # as after training: modulation is not zero
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    discriminator = FeatureDiscriminator(denoiser.backbone)
    reference = torch.stack(discriminator(denoiser, x, t, cond))
    for changed in [(x + 0.1, t, cond), (x, t + 50, cond), (x, t, {"class_labels": t.long() * 0})]:
        other = torch.stack(discriminator(denoiser, *changed))
        assert (other - reference).abs().max() > 1e-4


@pytest.mark.parametrize("kind", SHAPES)
def test_gradient_reaches_the_sample_through_the_frozen_network(kind: str) -> None:
    denoiser, x, t, cond = setting(kind)
    discriminator = FeatureDiscriminator(denoiser.backbone)
    x.requires_grad_()
    hinge_generator(discriminator(denoiser, x, t, cond)).backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_the_frozen_network_is_not_part_of_the_discriminator() -> None:
    denoiser, x, t, cond = setting("dit")
    discriminator = FeatureDiscriminator(denoiser.backbone)
    discriminator(denoiser, x, t, cond)
    theirs = {id(parameter) for parameter in denoiser.parameters()}
    assert not theirs & {id(parameter) for parameter in discriminator.parameters()}
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert not any(module is denoiser.backbone for module in discriminator.modules())


def test_heads_that_score_nothing_are_at_chance() -> None:
    denoiser, x, t, cond = setting("unet")
    discriminator = FeatureDiscriminator(denoiser.backbone)
    for module in discriminator.modules():
        if isinstance(module, Head):
            nn.init.zeros_(module.score.weight)
            nn.init.zeros_(module.score.bias)
    real, fake = (discriminator(denoiser, sample, t, cond) for sample in (x, -x))
    assert hinge_discriminator(real, fake) == 2
    assert hinge_generator(fake) == 1


def test_heads_learn_to_tell_two_sets_apart() -> None:
    denoiser, x, t, cond = setting("unet")
    discriminator = FeatureDiscriminator(denoiser.backbone, width=16)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    real, fake = (discriminator.features(denoiser, sample, t, cond) for sample in (x, -x))
    for _ in range(60):
        loss = hinge_discriminator(discriminator.score(real), discriminator.score(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1


def test_some_of_the_blocks_may_be_chosen() -> None:
    denoiser, x, t, cond = setting("unet")
    discriminator = FeatureDiscriminator(denoiser.backbone, blocks=["mid"])
    assert [tuple(s.shape) for s in discriminator(denoiser, x, t, cond)] == [(2, 1, 4, 4)]


def test_an_unknown_block_is_answered_with_the_nearest_and_all_names() -> None:
    with pytest.raises(FewstepError, match=r"'middle'.*Did you mean 'mid'\?.*down, mid"):
        FeatureDiscriminator(TinyUNet(), blocks=["middle"])


def test_a_backbone_without_feature_blocks_is_refused() -> None:
    with pytest.raises(FewstepError, match=r"Backbone names no feature blocks.*weight: 0"):
        FeatureDiscriminator(Backbone())


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 8), (8, 2), (3, 5), (16, 9)])
def test_tokens_form_the_map_they_came_from(height: int, width: int) -> None:
    grid = torch.arange(2 * 3 * height * width).view(2, 3, height, width)
    tokens = grid.flatten(2).transpose(1, 2)
    sample = torch.empty(2, 4, 2 * height, 2 * width)
    assert torch.equal(as_map(tokens, sample), grid)


def test_video_frames_fold_into_the_batch() -> None:
    clip = torch.randn(2, 3, 5, 4, 6)
    frames = as_map(clip, torch.empty(2, 1, 5, 8, 12))
    assert frames.shape == (10, 3, 4, 6)
    assert torch.equal(frames[7], clip[1, :, 2])


def test_a_videos_tokens_form_the_maps_of_its_frames() -> None:
    clip = torch.randn(2, 3, 5, 2, 6)
    tokens = clip.flatten(2).transpose(1, 2)
    sample = torch.empty(2, 1, 5, 4, 12)
    assert torch.equal(as_map(tokens, sample), as_map(clip, sample))


def test_maps_and_vectors_are_taken_as_they_are() -> None:
    image, vector = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    assert torch.equal(as_map(image, image), image)
    assert torch.equal(as_map(vector, vector)[:, :, 0, 0], vector)


def test_heads_take_the_precision_of_their_own_weights() -> None:
    denoiser, x, t, cond = setting("unet")
    discriminator = FeatureDiscriminator(denoiser.backbone)
    half = [feature.bfloat16() for feature in discriminator.features(denoiser, x, t, cond)]
    assert all(score.dtype == torch.float32 for score in discriminator.score(half))


def test_hooks_are_gone_after_use_even_after_an_error() -> None:
    network, x, t = TinyUNet(), torch.randn(2, 1, 8, 8), torch.ones(2)
    with tapped(network, ["down", "mid"]) as taken:
        network(x, t)
    assert list(taken) == ["down", "mid"]
    kept = taken["mid"]
    with pytest.raises(RuntimeError), tapped(network, ["mid"]):
        network(torch.randn(2, 3, 8, 8), t)
    network(x + 1, t)
    assert taken["mid"] is kept
    assert not any(module._forward_hooks for module in network.modules())
