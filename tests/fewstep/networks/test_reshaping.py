from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fewstep.diffusion import Backbone, Denoiser, FlowSchedule, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT, Latte, UViT, VideoDiT
from fewstep.networks.gates import ResidualGates, apply_gates
from fewstep.networks.reshaping import for_samples_of

SMALL: dict[str, Any] = {"patch_size": 4, "num_layers": 2, "num_heads": 2, "head_dim": 12}
Make = Callable[..., Backbone]


def video(make: Make, frames: int, size: int = 8, channels: int = 1) -> Denoiser:
    torch.manual_seed(frames)
    network = make(size, frames, channels, **SMALL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Denoiser(network, FlowSchedule(3.0), "flow_prediction")


@pytest.mark.parametrize("make", [VideoDiT, partial(Latte, num_classes=10)])
def test_weights_of_an_image_stage_make_videos_as_they_are(make: Make) -> None:
    image, clip = video(make, 1), video(make, 3, size=16)
    made = for_samples_of(image, clip)
    assert made.sample_shape == clip.sample_shape == (1, 3, 16, 16)
    assert image.sample_shape == (1, 1, 8, 8)
    weights = dict(made.named_parameters())
    for name, value in image.named_parameters():
        assert torch.equal(weights[name], value)
    x, t = torch.randn(2, 1, 3, 16, 16), torch.tensor([10.0, 700])
    cond = {"class_labels": torch.arange(2)}
    clip.load_state_dict(image.state_dict())
    assert torch.equal(made.raw(x, t, cond), clip.raw(x, t, cond))
    rebuilt = Denoiser.from_spec(made.to_spec())
    assert rebuilt.sample_shape == clip.sample_shape


def test_all_but_the_shape_stays_as_it_was() -> None:
    image = video(VideoDiT, 1).double().requires_grad_(False).eval()
    image.alpha_floor = 0.25
    apply_gates(image, ResidualGates())
    made = for_samples_of(image, video(VideoDiT, 3))
    expected, found = image.to_spec(), made.to_spec()
    assert found["backbone"]["init_args"].pop("num_frames") == 3
    assert expected["backbone"]["init_args"].pop("num_frames") == 1
    assert found == expected
    assert found["backbone"]["changes"]
    assert not made.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in made.parameters())


def test_a_network_of_the_wanted_shape_is_taken_itself() -> None:
    image = video(VideoDiT, 1)
    assert for_samples_of(image, video(Latte, 1)) is image


def uvit(frames: int) -> Denoiser:
    network = UViT(8, 1, num_frames=frames, **{**SMALL, "num_layers": 3})
    return Denoiser(network, VPSchedule(), "epsilon")


def dit() -> Denoiser:
    return Denoiser(DiT(8, 1, num_layers=1), VPSchedule(), "epsilon")


@pytest.mark.parametrize(
    ("denoiser", "other", "message"),
    [
        (uvit(1), uvit(2), "weights depend on the shape.*positions"),
        (dit(), video(VideoDiT, 2), "This is DiT, a network .* and VideoDiT makes these"),
        (video(VideoDiT, 1), video(VideoDiT, 1, channels=2), "nothing in its description"),
        (video(VideoDiT, 1), video(VideoDiT, 2, channels=2), "more than their size and length"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_with_its_reason(
    denoiser: Denoiser, other: Denoiser, message: str
) -> None:
    with pytest.raises(FewstepError, match=message):
        for_samples_of(denoiser, other)
