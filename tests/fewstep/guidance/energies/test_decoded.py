from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TextToVideoSDPipeline
from torch import Tensor, nn

from fewstep.diffusion import VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    Decoded,
    DiffAugment,
    EachFrame,
    Energy,
    Objective,
    Smoothing,
    Sum,
    Target,
    plan_steps,
)
from fewstep.guidance.freezing import frozen, modules_within
from fewstep.networks.latents import LatentCodec

from metric_cases import noise
from tiny_pipelines import image_vae, save_text_to_video, tiny_vae

STEP = plan_steps(VPSchedule(), VPSchedule().spaced_times(4), DDIM())[2]


class Gap(Energy):
    """Mean squared distance from a picture."""

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        assert isinstance(target, Tensor)
        return (x0 - target).square().flatten(1).mean(1)


def codec() -> LatentCodec:
    torch.manual_seed(0)
    return LatentCodec.of(image_vae(scaling_factor=0.5, shift_factor=0.25).eval())


def slope(energy: Energy, latents: Tensor, target: Tensor) -> Tensor:
    leaf = latents.clone().requires_grad_()
    return torch.autograd.grad(energy(leaf, target).sum(), leaf)[0]


def test_a_loss_of_latents_is_that_of_their_pixels_with_a_gradient() -> None:
    decoder = codec()
    latents, target = noise(3, 4, 4, 4), noise(3, 3, 8, 8, seed=1)
    energy = Decoded(Gap(), decoder)
    pixels = decoder.vae.decode(latents / 0.5 + 0.25).sample
    torch.testing.assert_close(energy(latents, target), Gap()(pixels, target))
    gradient = slope(energy, latents, target)
    assert bool((gradient != 0).all())
    alone = slope(energy, latents[1:2], target[1:2])
    torch.testing.assert_close(alone[0], gradient[1], rtol=1e-4, atol=1e-7)


def test_saving_memory_changes_no_gradient() -> None:
    decoder = codec()
    latents, target = noise(3, 4, 4, 4), noise(3, 3, 8, 8, seed=1)
    expected = slope(Decoded(Gap(), decoder), latents, target)
    for options in ({"checkpointed": True}, {"at_once": 1}, {"checkpointed": True, "at_once": 2}):
        found = slope(Decoded(Gap(), decoder, **options), latents, target)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    decoder.vae.enable_slicing()
    torch.testing.assert_close(
        slope(Decoded(Gap(), decoder), latents, target), expected, rtol=1e-4, atol=1e-7
    )


def test_chosen_frames_of_a_video_are_decoded_and_the_others_get_no_gradient(
    tmp_path: Path,
) -> None:
    folder = save_text_to_video(tmp_path, TextToVideoSDPipeline)
    decoder = LatentCodec(folder)
    latents, target = noise(2, 4, 3, 4, 4), noise(2, 3, 8, 8, seed=1)
    energy = Decoded(EachFrame(Gap()), decoder, frames=(0, 2), checkpointed=True)
    whole = decoder.pixels(latents)
    expected = (Gap()(whole[:, :, 0], target) + Gap()(whole[:, :, 2], target)) / 2
    torch.testing.assert_close(energy(latents, target), expected)
    gradient = slope(energy, latents, target)
    assert not gradient[:, :, 1].any()
    assert bool((gradient[:, :, [0, 2]] != 0).all())
    with pytest.raises(FewstepError, match="leave frames out"):
        Decoded(Gap(), decoder, frames=())
    with pytest.raises(FewstepError, match="one sample at a time"):
        Decoded(Gap(), decoder, at_once=0)


class Counting:
    """A decoder that says how many latents it was given."""

    def __init__(self, decoder: LatentCodec) -> None:
        self.decoder, self.counts = decoder, list[int]()

    def pixels(self, latents: Tensor, checkpointed: bool = False) -> Tensor:
        self.counts.append(len(latents))
        return self.decoder.pixels(latents, checkpointed)

    def decode_frames(self, latents: Tensor, frames: Tensor, checkpointed: bool = False) -> Tensor:
        return self.decoder.decode_frames(latents, frames, checkpointed)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(2)]


def test_views_are_made_of_pixels_after_each_sample_was_decoded_once() -> None:
    counting = Counting(codec())
    energy, views = Decoded(Gap(), counting), DiffAugment(copies=6)
    latents, target = noise(2, 4, 4, 4), noise(2, 3, 8, 8, seed=1)
    loss = Objective(energy, views).drawn(latents, target, STEP, generators())(latents)
    assert counting.counts == [2]
    # The same, view by view: decode, look, compare.
    pixels = counting.decoder.pixels(latents)
    uniform = torch.special.ndtr(
        torch.stack([torch.randn(6, 8, generator=g) for g in generators()])
    )
    each = [Gap()(views(pixels, None, uniform[:, view])[0], target) for view in range(6)]
    torch.testing.assert_close(loss, torch.stack(each).mean(0))
    counting.counts.clear()
    smoothing = Smoothing(0.3, copies=3)
    Objective(energy, views, smoothing).drawn(latents, target, STEP, generators())(latents)
    assert counting.counts == [6]  # each noisy copy of the latents is another picture


def test_networks_are_found_and_frozen_however_deep_they_are() -> None:
    inner, vae = nn.Linear(2, 2), tiny_vae()

    class Holder(Energy):
        def __init__(self, network: nn.Module) -> None:
            self.deep = {"list": [(network,)], "method": network.forward}

        def __call__(self, x0: Tensor, target: Target) -> Tensor:
            return x0.flatten(1).sum(1)

    energy = Decoded(Sum({"a": EachFrame(Holder(inner)), "b": Gap()}), LatentCodec.of(vae))
    assert set(modules_within(energy)) == {inner, vae}
    parameters: list[Any] = [*inner.parameters(), *vae.parameters()]
    parameters[0].requires_grad_(False)
    asked = [p.requires_grad for p in parameters]
    with frozen(energy):
        assert not any(p.requires_grad for p in parameters)
    assert [p.requires_grad for p in parameters] == asked
    assert sum(asked) == len(asked) - 1
