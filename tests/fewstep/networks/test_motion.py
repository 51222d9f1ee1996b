"""Motion representations: what they keep, what they leave free, and how a head collapses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.losses import pseudo_huber
from fewstep.errors import FewstepError
from fewstep.networks import ema_update
from fewstep.networks.motion.base import FrameDifference, MotionRepresentation, RawMotion
from fewstep.networks.motion.correlation import GlobalCorrelation, LocalCorrelation
from fewstep.networks.motion.frequency import HighFrequency, LowFrequency
from fewstep.networks.motion.heads import HeavyLearnableHead, LearnableDifference, LearnableHead
from fewstep.networks.motion.statistics import COLLAPSED_VARIANCE, motion_statistics

SHAPE = (4, 5, 6, 8)
ALL: list[Callable[[], MotionRepresentation]] = [
    RawMotion,
    FrameDifference,
    LowFrequency,
    HighFrequency,
    lambda: LocalCorrelation(radius=2),
    GlobalCorrelation,
    LearnableHead,
    lambda: HeavyLearnableHead(width=32, layers=2),
    LearnableDifference,
]
HEADS = ALL[-3:]
SHORTENING = ALL[1], ALL[4], ALL[5], ALL[8]
every = pytest.mark.parametrize("make", ALL)
every_head = pytest.mark.parametrize("make", HEADS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def ready(
    made: MotionRepresentation, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> Any:
    """Configured, and, if it can be trained, no longer the identity."""
    made.configure(shape)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return made.to(dtype)


def videos(size: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, *SHAPE, dtype=dtype)


def relative_change(representation: Any, video: Tensor, other: Tensor) -> float:
    before, after = representation(video), representation(other)
    return ((after - before).norm() / before.norm()).item()


def video_gradient(representation: Any, video: Tensor, target: Tensor) -> Tensor:
    leaf = video.clone().requires_grad_()
    pseudo_huber(representation(leaf), representation(target).detach()).backward()
    assert leaf.grad is not None
    return leaf.grad


# ---------------------------------------------------------------------- what is left free


@every
def test_a_declared_invariance_holds_and_no_other_does(
    make: Callable[[], MotionRepresentation],
) -> None:
    representation, video = ready(make()), videos()
    batch, channels, _, height, width = video.shape
    added = {
        "static_image": torch.randn(batch, channels, 1, height, width, dtype=video.dtype),
        "channel_constant": torch.randn(batch, channels, 1, 1, 1, dtype=video.dtype),
    }
    for name, addition in added.items():
        change = relative_change(representation, video, video + addition)
        if name in representation.invariances:
            assert change < 1e-12, name
        else:
            assert change > 1e-2, name


def test_differences_leave_the_mean_over_time_free() -> None:
    video, target = videos(), videos()
    gradient = video_gradient(ready(FrameDifference()), video, target)
    assert gradient.sum(2).abs().max() < 1e-15
    assert gradient.abs().max() > 1e-4
    assert video_gradient(RawMotion(), video, target).sum(2).abs().max() > 1e-3


def test_high_frequencies_leave_each_channels_mean_free() -> None:
    video, target = videos(), videos()
    gradient = video_gradient(ready(HighFrequency()), video, target)
    assert gradient.sum((2, 3, 4)).abs().max() < 1e-15
    assert gradient.sum(2).abs().max() > 1e-4, "a static image's details are not free"
    assert video_gradient(RawMotion(), video, target).sum((2, 3, 4)).abs().max() > 1e-3


@every
def test_a_samples_representation_does_not_depend_on_its_batch(
    make: Callable[[], MotionRepresentation],
) -> None:
    representation, video = ready(make()), videos(3)
    together = representation(video)
    assert len(together) == 3
    for row in range(3):
        assert torch.allclose(representation(video[row : row + 1])[0], together[row], atol=1e-12)


@every
def test_gradients_are_those_of_the_function(make: Callable[[], MotionRepresentation]) -> None:
    representation = ready(make(), (2, 3, 3, 2))
    video = torch.randn(1, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(representation, (video,))


# ---------------------------------------------------------------------- frequencies


def filters(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return ready(LowFrequency(), shape, torch.float32), ready(HighFrequency(), shape, torch.float32)


@pytest.mark.parametrize("shape", [(4, 16, 32, 32), (2, 5, 7, 6), (1, 1, 8, 9)])
def test_low_and_high_frequencies_add_up_to_the_video(shape: tuple[int, ...]) -> None:
    low, high = filters(shape)
    video = torch.randn(2, *shape)
    assert torch.allclose(low(video) + high(video), video, atol=2e-6)
    assert low(video).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (1, 5, 7, 6), (1, 1, 8, 9)])
def test_a_constant_passes_the_low_pass_filter_alone(shape: tuple[int, ...]) -> None:
    low, high = filters(shape)
    constant = torch.full((1, *shape), 3.0)
    assert torch.allclose(low(constant), constant, atol=1e-5)
    assert high(constant).abs().max() < 1e-5


def test_the_low_pass_filter_keeps_little_of_white_noise() -> None:
    # The energy of a unit impulse's response is the share of white noise's variance that is kept.
    impulse = torch.zeros(1, 1, 16, 32, 32, dtype=torch.float64)
    impulse[0, 0, 3, 5, 7] = 1
    low, high = ready(LowFrequency(), impulse.shape[1:]), ready(HighFrequency(), impulse.shape[1:])
    assert low(impulse).square().sum().item() == pytest.approx(0.00649, abs=1e-5)
    assert high(impulse).square().sum().item() > 0.98
    assert low(torch.randn_like(impulse)).var().item() == pytest.approx(0.0065, abs=2e-3)


def test_the_filter_is_freeinits_of_centred_spectra() -> None:
    frames, height, width, space, time, order = 6, 8, 4, 0.3, 0.6, 2
    mask = torch.empty(frames, height, width, dtype=torch.float64)
    for f in range(frames):
        for h in range(height):
            for w in range(width):
                distance = (space / time * (2 * f / frames - 1)) ** 2
                distance += (2 * h / height - 1) ** 2 + (2 * w / width - 1) ** 2
                mask[f, h, w] = 1 / (1 + (distance / space**2) ** order)
    video = torch.randn(1, 2, frames, height, width, dtype=torch.float64)
    axes = (-3, -2, -1)
    spectrum = torch.fft.fftshift(torch.fft.fftn(video, dim=axes), dim=axes) * mask
    expected = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=axes), dim=axes).real
    found = ready(LowFrequency(space, time, order), (2, frames, height, width))(video)
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_filter_keeps_its_precision_in_a_half_precision_module() -> None:
    low = ready(LowFrequency(), SHAPE, torch.bfloat16)
    video = videos(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = low(video)
    assert torch.equal(found, ready(LowFrequency(), SHAPE, torch.float32)(video))
    assert not list(low.state_dict())


# ---------------------------------------------------------------------- correlations


def test_local_correlations_are_those_of_a_plain_loop() -> None:
    radius, (channels, frames, height, width) = 2, (3, 3, 4, 5)
    video = torch.randn(2, channels, frames, height, width, dtype=torch.float64)
    expected: list[Tensor] = []
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            for y in range(height):
                for x in range(width):
                    if 0 <= y + down < height and 0 <= x + right < width:
                        here = video[:, :, :-1, y, x]
                        there = video[:, :, 1:, y + down, x + right]
                        expected.append((here * there).sum(1) / math.sqrt(channels))
    found = ready(LocalCorrelation(radius), (channels, frames, height, width))(video)
    assert found.shape == (2, frames - 1, len(expected))
    assert torch.allclose(found, torch.stack(expected, dim=2), atol=1e-12)


def test_no_entry_of_a_local_correlation_stands_for_a_place_outside() -> None:
    # Of the 225 x 1024 entries that MCM's code has for 32 x 32, it found 22 % to be fillers.
    entries = LocalCorrelation()(torch.ones(1, 4, 2, 32, 32))
    assert torch.equal(entries, torch.full_like(entries, 2.0))
    assert 1 - entries.shape[2] / (225 * 1024) == pytest.approx(0.22, abs=0.005)


def test_a_wide_window_sees_all_pairs() -> None:
    video = torch.randn(2, 4, 3, 3, 4, dtype=torch.float64)
    local, everything = LocalCorrelation(9)(video), GlobalCorrelation()(video)
    assert everything.shape == (2, 2, 12, 12)
    assert torch.allclose(
        local.flatten(1).sort().values, everything.flatten(1).sort().values, atol=1e-12
    )
    first, second = video[0, :, 0, 1, 2], video[0, :, 1, 2, 3]
    assert everything[0, 0, 6, 11].item() == pytest.approx((first @ second / 2).item())
    scaled = GlobalCorrelation(height_scaled=True)(video)
    assert torch.allclose(scaled, everything * math.sqrt(3))


def test_autocast_does_not_round_global_correlations() -> None:
    video = videos(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = GlobalCorrelation()(video)
    assert torch.equal(found, GlobalCorrelation()(video))


# ---------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("head", "parameters"),
    [(LearnableHead(), 708), (HeavyLearnableHead(), 113_924), (LearnableDifference(), 708)],
)
def test_heads_have_as_many_parameters_as_the_released_ones(
    head: MotionRepresentation, parameters: int
) -> None:
    head.configure((4, 16, 32, 32))
    assert sum(p.numel() for p in head.parameters()) == parameters


@every_head
def test_a_head_starts_as_what_it_is_a_change_of(make: Callable[[], MotionRepresentation]) -> None:
    head, video = make(), videos(dtype=torch.float32)
    head.configure(SHAPE)
    assert torch.equal(head(video), head.untrained(video))
    found = motion_statistics(head(video), head.untrained(video))
    assert [round(value.item(), 5) for value in found.values()] == [1, 1]


def test_a_fresh_heads_update_is_that_of_the_video_itself() -> None:
    head, video, target = LearnableHead(), videos(), videos()
    head.configure(SHAPE)
    head.double()
    raw = video_gradient(RawMotion(), video, target)
    assert torch.equal(video_gradient(head, video, target), raw)


@every_head
def test_the_last_convolution_alone_learns_at_first(
    make: Callable[[], MotionRepresentation],
) -> None:
    head: Any = make()
    head.configure(SHAPE)
    head(videos(dtype=torch.float32)).square().mean().backward()
    last = {id(p) for p in head.residual[-1].parameters()}
    for name, parameter in head.named_parameters():
        assert parameter.grad.any() == (id(parameter) in last), name


@pytest.mark.parametrize("make", HEADS[:2])
def test_a_heads_frames_do_not_see_one_another(make: Callable[[], MotionRepresentation]) -> None:
    head, video = ready(make()), videos()
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(head(video[:, :, order]), head(video)[:, :, order], atol=1e-12)
    low = ready(LowFrequency())
    assert not torch.allclose(low(video[:, :, order]), low(video)[:, :, order], atol=1e-3)


def test_a_difference_head_is_a_head_on_differences() -> None:
    head, plain = ready(LearnableDifference()), ready(LearnableHead())
    plain.load_state_dict(head.state_dict())
    video = videos()
    assert torch.allclose(head(video), plain(video[:, :, 1:] - video[:, :, :-1]), atol=1e-12)


def test_a_head_trained_by_the_loss_alone_collapses_and_the_variance_tells() -> None:
    head = LearnableHead()
    head.configure((4, 2, 8, 8))
    average = copy.deepcopy(head).requires_grad_(False)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    ratios = []
    for _ in range(250):
        video = torch.randn(2, 4, 2, 8, 8)
        student, target = (video + 0.3 * torch.randn_like(video) for _ in range(2))
        loss = pseudo_huber(head(student), average(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(average, head, 0.95)
        ratios.append(motion_statistics(head(video), video)["motion_variance"].item())
    assert ratios[0] > COLLAPSED_VARIANCE > ratios[-1]


# ---------------------------------------------------------------------- all of them


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full_precision(
    make: Callable[[], MotionRepresentation], dtype: torch.dtype
) -> None:
    representation, video = ready(make()), videos()
    expected = representation(video)
    found = representation.to(dtype)(video.to(dtype))
    assert torch.isfinite(found).all()
    assert ((found.double() - expected).norm() / expected.norm()).item() < 0.02


@every_head
def test_a_half_precision_head_takes_a_float32_video(
    make: Callable[[], MotionRepresentation],
) -> None:
    assert ready(make(), dtype=torch.bfloat16)(videos(dtype=torch.float32)).dtype == torch.float32


@every
def test_one_frame_is_refused_where_frames_are_compared(
    make: Callable[[], MotionRepresentation],
) -> None:
    single, video = (4, 1, 6, 8), torch.randn(2, 4, 1, 6, 8)
    if make in SHORTENING:
        with pytest.raises(FewstepError, match=r"at least 2, not 1\. Give more frames"):
            make().configure(single)
        make().configure((4, 2, 6, 8))
    else:
        assert ready(make(), single, torch.float32)(video).shape == video.shape


@every
def test_images_are_refused(make: Callable[[], MotionRepresentation]) -> None:
    with pytest.raises(FewstepError, match=r"samples here have shape \[4, 8, 8\]"):
        make().configure((4, 8, 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LocalCorrelation(-1),
        lambda: LowFrequency(stop_temporal=0),
        lambda: HighFrequency(order=0),
        lambda: LearnableHead(0),
        lambda: HeavyLearnableHead(layers=0),
    ],
)
def test_options_out_of_range_are_named(make: Callable[[], MotionRepresentation]) -> None:
    with pytest.raises(FewstepError, match="needs"):
        make()


def test_statistics_are_variance_ratio_and_correlation() -> None:
    video = torch.randn(4, 3, 4, 5, 5) + 7
    other = torch.randn_like(video)
    found = motion_statistics((-2 * video + other).requires_grad_(), video)
    assert not any(value.requires_grad for value in found.values())
    assert found["motion_variance"].item() == pytest.approx(5, rel=0.1)
    assert found["motion_correlation"].item() == pytest.approx(-2 / math.sqrt(5), rel=0.02)
    assert set(motion_statistics(video[:, :, 1:], video)) == {"motion_variance"}
    constant = torch.ones_like(video)
    for statistics in (motion_statistics(constant, video), motion_statistics(constant, constant)):
        assert [value.item() for value in statistics.values()] == [0, 0]
