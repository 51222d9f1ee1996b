"""The mark and the sharpness of moving digits, against clips that are made with and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.metrics import Sharpness, WatermarkEnergy
from fewstep.metrics.moving_digits import light, mark_strength, unmarked
from fewstep.watermark import watermark

from metric_cases import batches, measured, measured_by_ranks, noise
from moving_samples import digit_clips


def strengths(pixels: torch.Tensor) -> torch.Tensor:
    return mark_strength(light(pixels))


# ------------------------------------------------------------------ the mark


@pytest.mark.parametrize("num_frames", [8, 16])
def test_the_mark_is_there_in_watermarked_clips_and_in_no_others(num_frames: int) -> None:
    for kind, expected in (("clear", 0.0), ("watermarked", 1.0)):
        pixels, _ = digit_clips(kind, 100, num_frames=num_frames)  # type: ignore[arg-type]
        found = strengths(pixels)
        assert float(found.mean()) == pytest.approx(expected, abs=0.03)
        assert float((found - expected).abs().median()) < 0.01
        value = measured(WatermarkEnergy(), batches(pixels, 40))
        assert value == {"watermark_energy": pytest.approx(float(found.mean()))}


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("background", [0.0, 0.1])
def test_a_mark_of_any_strength_over_moving_digits_is_measured(
    strength: float, background: float
) -> None:
    pixels, _ = digit_clips("clear", 30)
    frames = background + (1 - background) * light(pixels)
    opacity = strength * torch.from_numpy(watermark(32))
    marked = frames * (1 - opacity) + opacity
    found = strengths((marked * 2 - 1)[:, None])
    assert float((found - strength).abs().max()) < 0.1
    assert float((found - strength).abs().mean()) < 0.02


def test_a_digit_that_passes_below_the_mark_is_not_taken_for_it() -> None:
    video = -torch.ones(1, 1, 16, 32, 32)
    for frame in range(16):
        video[:, :, frame, 20:28, 2 * frame : 2 * frame + 4] = 1
    assert float(strengths(video)) == pytest.approx(0, abs=0.01)
    pair = torch.stack([light(video).mean(1)[0], torch.from_numpy(watermark(32))]).flatten(1)
    (_, covariance), (_, variance) = torch.cov(pair)
    assert float(covariance / variance) > 0.1  # the mean frame would be deceived


def test_what_is_left_without_the_mark_are_the_digits() -> None:
    pixels, _ = digit_clips("clear", 20)
    opacity = torch.from_numpy(watermark(32))
    frames = light(pixels)
    marked = light(((frames * (1 - opacity) + opacity) * 2 - 1)[:, None])
    assert float((marked - frames).abs().mean()) > 0.01
    assert float((unmarked(marked) - frames).abs().max()) < 0.03
    assert float((unmarked(frames) - frames).abs().max()) < 0.03


@pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
def test_samples_without_contrast_have_neither_mark_nor_edges(value: float) -> None:
    flat = torch.full((2, 1, 8, 32, 32), value)
    assert strengths(flat).abs().max() < 1e-6
    assert unmarked(light(flat)).isfinite().all()
    assert measured(Sharpness(), batches(flat)) == {"sharpness": 0.0}


# ------------------------------------------------------------------ sharpness


def test_crisp_and_clear_digits_are_several_times_as_sharp_as_blurred_ones() -> None:
    found = {}
    for kind in ("clear", "crisp", "watermarked"):
        pixels, _ = digit_clips(kind, 60)  # type: ignore[arg-type]
        found[kind] = measured(Sharpness(), batches(pixels, 30))["sharpness"]
        images = measured(Sharpness(), batches(pixels[:, :, 5], 30))["sharpness"]
        assert images == pytest.approx(found[kind], rel=0.1)
    assert found["clear"] == pytest.approx(0.43, abs=0.05)
    assert found["crisp"] == pytest.approx(found["clear"], rel=0.15)
    assert found["clear"] > 3 * found["watermarked"]


def test_sharpness_is_that_of_the_digits_alone() -> None:
    pixels, _ = digit_clips("clear", 20)
    plain = measured(Sharpness(), batches(pixels))["sharpness"]
    opacity = torch.from_numpy(watermark(32))
    marked = ((light(pixels) * (1 - opacity) + opacity) * 2 - 1)[:, None]
    assert measured(Sharpness(), batches(marked))["sharpness"] == pytest.approx(plain)
    fainter = -1 + (pixels + 1) / 2
    assert measured(Sharpness(), batches(fainter))["sharpness"] == pytest.approx(plain, rel=0.02)


def test_sharpness_has_the_values_of_simple_patterns() -> None:
    row = torch.arange(64).float()
    wave = torch.sin(row * 2 * np.pi / 16).expand(1, 1, 64, 64)
    # The Laplacian of a wave of frequency k is 2 cos k - 2 times the wave.
    expected = (2 * np.cos(2 * np.pi / 16) - 2) ** 2
    vertical = measured(Sharpness(), batches(wave))["sharpness"]
    assert vertical == pytest.approx(expected, rel=0.02)
    turned = measured(Sharpness(), batches(wave.mT))["sharpness"]
    assert turned == pytest.approx(expected, rel=0.02)
    grain = measured(Sharpness(), batches(noise(4, 1, 8, 64, 64)))["sharpness"]
    assert grain == pytest.approx(20, rel=0.02)  # 4 times 1 and once 16


def test_sharpness_is_read_against_the_datas() -> None:
    blurred, _ = digit_clips("watermarked", 12)
    clear, _ = digit_clips("clear", 12)
    own = [measured(Sharpness(), batches(p))["sharpness"] for p in (blurred, clear)]
    assert measured(Sharpness(), batches(blurred), batches(clear)) == {
        "sharpness": pytest.approx(own[0]),
        "sharpness_ratio": pytest.approx(own[0] / own[1]),
        "sharpness_error": pytest.approx(1 - own[0] / own[1]),
    }
    with pytest.raises(FewstepError, match="no edges at all"):
        measured(Sharpness(), batches(clear), batches(-torch.ones_like(clear)))


# ------------------------------------------------------------------ both


def test_ranks_together_and_any_order_say_what_one_process_says() -> None:
    pixels, _ = digit_clips("watermarked", 7)
    clear, _ = digit_clips("clear", 5, start=50)
    order = [3, 6, 0, 5, 1, 2, 4]
    for metric in (WatermarkEnergy(), Sharpness()):
        sets = batches(pixels, 2), batches(clear, 3)
        whole = measured(metric, *sets)
        assert measured(metric, batches(pixels, 3, order=order), sets[1]) == pytest.approx(whole)
        for found in measured_by_ranks(metric, *sets):
            assert found == pytest.approx(whole, rel=1e-12)


def test_what_is_no_moving_digit_is_an_error() -> None:
    with pytest.raises(FewstepError, match="takes videos"):
        measured(WatermarkEnergy(), batches(noise(2, 1, 32, 32)))
    for shape in ((2, 3, 4, 32, 32), (2, 1, 4, 32, 16), (2, 3, 32, 32), (2, 2)):
        with pytest.raises(FewstepError, match="square grey"):
            measured(Sharpness(), batches(noise(*shape)))


def test_they_say_what_they_compare_with_and_which_way_is_better() -> None:
    assert WatermarkEnergy().reference == "none"
    assert WatermarkEnergy().better == {"watermark_energy": "lower"}
    assert Sharpness().own_values == {"sharpness"}
    assert Sharpness().better["sharpness_error"] == "lower"
