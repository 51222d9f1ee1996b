"""The parts together, as a method uses them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.diffusion.losses import (
    hinge_discriminator,
    hinge_generator,
    one_centred_penalty,
)
from fewstep.networks.frames import (
    NUM_UNIFORMS,
    ClassCondition,
    ConvolutionFeatures,
    DiffAugment,
    FrameDiscriminator,
)
from fewstep.networks.latents import chosen_frames

SEEN = ConvolutionFeatures(widths=[8, 16])
CONDITION = ClassCondition(num_classes=3)


def discriminator() -> FrameDiscriminator:
    torch.manual_seed(0)
    return FrameDiscriminator(SEEN.channels, CONDITION.dim, width=8, kernel=3)


def turns(heads: FrameDiscriminator, video: Tensor, real: Tensor, draws: dict[str, Tensor]) -> None:
    """Both turns' backward passes, with two frames of each video."""
    augment = DiffAugment()
    cond = CONDITION({"class_labels": draws["labels"]}, None, video.device).repeat_interleave(2, 0)
    fake = augment(chosen_frames(video, draws["frames"]).flatten(0, 1), draws["fake"])
    features = SEEN(fake)
    loss = hinge_generator([heads.score(features, cond)])
    loss.backward(inputs=[video])

    real = augment(real.flatten(0, 1), draws["real"])
    scores = heads.score(SEEN(real), cond)
    fake_scores = heads.score([level.detach() for level in features], cond)
    mixed = torch.lerp(real, fake.detach(), draws["mix"][:, None, None, None])
    leaves = [level.requires_grad_() for level in SEEN(mixed)]
    loss = hinge_discriminator([scores], [fake_scores])
    loss = loss + 1e-2 * one_centred_penalty(leaves, [heads.score(leaves, cond)])
    loss.backward(inputs=list(heads.parameters()))


def drawn(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "labels": torch.randint(3, (count,), generator=generator),
        "frames": torch.rand(count, 5, generator=generator).argsort(1)[:, :2],
        "fake": torch.rand(2 * count, NUM_UNIFORMS, generator=generator),
        "real": torch.rand(2 * count, NUM_UNIFORMS, generator=generator),
        "mix": torch.rand(2 * count, generator=generator),
    }


def test_splitting_a_batch_changes_no_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    video = torch.rand(4, 3, 5, 16, 16, generator=generator).requires_grad_()
    real, draws = torch.rand(4, 2, 3, 16, 16, generator=generator), drawn(4)
    whole, parts = discriminator(), discriminator()
    turns(whole, video, real, draws)
    assert video.grad is not None
    expected, video.grad = video.grad, None
    for start in (0, 2):
        rows = {n: v[start * len(v) // 4 :][: len(v) // 2] for n, v in draws.items()}
        part = video[start : start + 2].detach().requires_grad_()
        turns(parts, part, real[start : start + 2], rows)
        assert part.grad is not None
        torch.testing.assert_close(part.grad / 2, expected[start : start + 2])
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad / 2, theirs.grad, atol=1e-6, rtol=1e-4)
    untouched = expected.abs().sum((1, 3, 4)).eq(0)
    assert untouched.sum(1).tolist() == [3] * 4  # of five frames
    assert not untouched.gather(1, draws["frames"]).any()


def test_nothing_asks_for_a_value() -> None:
    heads, draws = discriminator(), drawn(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        video = torch.rand(2, 3, 5, 16, 16, requires_grad=True)
        fake_draws = {name: torch.empty_like(value) for name, value in draws.items()}
        turns(heads, video, torch.rand(2, 2, 3, 16, 16), fake_draws)
        heads.advance()
    assert video.grad is not None
