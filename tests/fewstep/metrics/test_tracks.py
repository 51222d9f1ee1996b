"""Tracks of digits, against the ones that clips were made with."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from datamodules.moving_clips import Clip
from fewstep.errors import FewstepError
from fewstep.metrics import EndError, Samples, TrackAcceleration, TrackError, tracks

from metric_cases import batches, measured, measured_by_ranks, noise
from moving_samples import digit_clips


def centres(clips: Sequence[Clip]) -> Tensor:
    """``(B, F, 2)`` of the first digit."""
    return torch.from_numpy(np.stack([clip.centres[0] for clip in clips]))


def compared(first: Tensor, second: Tensor) -> dict[str, float]:
    return measured(TrackError(), batches(first), batches(second, 4))


@pytest.mark.parametrize(("kind", "error"), [("clear", 0.08), ("watermarked", 0.15)])
@pytest.mark.parametrize("num_frames", [8, 16])
def test_the_track_is_the_one_the_clip_was_made_with(
    kind: str, error: float, num_frames: int
) -> None:
    pixels, clips = digit_clips(kind, 80, num_frames=num_frames, max_digits=1)  # type: ignore[arg-type]
    off = (tracks(pixels) - centres(clips)).norm(dim=-1)
    assert float(off.mean()) < error
    assert float(off.max()) < 0.6
    steps = (tracks(pixels).diff(dim=1) - centres(clips).diff(dim=1)).norm(dim=-1)
    assert float(steps.mean()) < 0.04


def test_two_digits_have_one_centre_between_them_by_their_ink() -> None:
    pixels, clips = digit_clips("clear", 60)
    seen = 0
    for track, clip in zip(tracks(pixels).numpy(), clips, strict=True):
        if len(clip.classes) == 1:
            continue
        line, way = clip.centres[1] - clip.centres[0], track - clip.centres[0]
        length = np.hypot(*line.T)
        apart = length > 13  # their ink does not overlap
        beside = (line[:, 0] * way[:, 1] - line[:, 1] * way[:, 0]) / length
        assert np.abs(beside[apart]).max(initial=0) < 0.3
        share = ((line * way).sum(-1) / length**2)[apart]  # of the second digit's ink
        assert ((share > 0.2) & (share < 0.8)).all()
        assert np.ptp(share) < 0.05 if len(share) else True
        seen += int(apart.sum())
    assert seen > 50


def test_blur_and_the_mark_do_not_move_a_track() -> None:
    clear, _ = digit_clips("clear", 40)
    marked, _ = digit_clips("watermarked", 40)  # the same motion, blurred and marked
    found = compared(marked, clear)
    assert found["track_error"] < 0.1
    assert found["velocity_error"] < 0.05
    assert found["tracks_lost"] == 0
    others = compared(clear.roll(1, 0), clear)
    assert others["track_error"] > 50 * found["track_error"]
    assert others["velocity_error"] > 20 * found["velocity_error"]


def test_blurring_and_sharpening_are_alike_to_it() -> None:
    clear, _ = digit_clips("clear", 20, max_digits=1)
    frames = clear.squeeze(1)
    soft = gaussian_blur(frames, [5, 5], [0.8, 0.8])
    sharp = (frames + 0.6 * (frames - soft)).clamp(-1, 1)
    for other in (soft, sharp):
        assert compared(other[:, None], clear)["track_error"] < 0.12


def test_a_pixel_aside_is_an_error_of_one_and_of_no_velocity() -> None:
    video = -torch.ones(3, 1, 8, 32, 32)
    for frame in range(8):
        video[:, :, frame, 4:10, 3 + frame : 9 + frame] = 0.6
    for shift, size in (((0, 1), 1.0), ((2, 0), 2.0), ((3, 4), 5.0)):
        found = compared(video.roll(shift, (-2, -1)), video)
        assert found["track_error"] == pytest.approx(size, abs=1e-3)
        assert found["velocity_error"] == pytest.approx(0, abs=1e-3)
    faster = -torch.ones(3, 1, 8, 32, 32)
    for frame in range(8):
        faster[:, :, frame, 4:10, 3 + 3 * frame : 9 + 3 * frame] = 0.6
    found = compared(faster, video)
    assert found["velocity_error"] == pytest.approx(2, abs=1e-3)
    assert found["track_error"] == pytest.approx(7, abs=1e-3)  # 2 times the mean of 0 to 7


def test_frames_without_ink_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    clear, _ = digit_clips("clear", 4, num_frames=8)
    holes = clear.clone()
    holes[:, :, 3] = -0.9  # too faint for ink
    found = compared(holes, clear)
    assert found["tracks_lost"] == pytest.approx(1 / 8)
    assert found["track_error"] < 0.02
    assert found["velocity_error"] < 0.02
    assert tracks(holes)[:, 3].isnan().all()
    both = compared(holes, holes)
    assert both == {"track_error": 0.0, "velocity_error": 0.0, "tracks_lost": 0.0}
    with caplog.at_level(logging.WARNING):
        assert compared(-torch.ones_like(clear), clear) == {"tracks_lost": 1.0}
    assert "no frames of a pair have ink" in caplog.text


def test_ranks_together_and_any_order_say_what_one_process_says() -> None:
    clear, _ = digit_clips("clear", 7)
    marked, _ = digit_clips("watermarked", 7)
    whole = compared(marked, clear)
    order = [3, 6, 0, 5, 1, 2, 4]
    assert measured(TrackError(), batches(marked, 2, order=order), batches(clear)) == whole
    assert measured_by_ranks(TrackError(), batches(marked, 2), batches(clear)) == [whole]


def test_only_so_many_tracks_are_kept() -> None:
    clear, _ = digit_clips("clear", 12, num_frames=4)
    marked, _ = digit_clips("watermarked", 12, num_frames=4)
    found = measured(TrackError(pairs=5), batches(marked), batches(clear))
    assert found == compared(marked[:5], clear[:5])
    assert found != compared(marked, clear)


def test_what_has_no_track_is_an_error() -> None:
    for shape in ((2, 1, 32, 32), (2, 1, 1, 32, 32)):
        with pytest.raises(FewstepError, match="at least 2 frames"):
            measured(TrackError(), batches(noise(*shape)), batches(noise(*shape)))
    with pytest.raises(FewstepError, match="square grey"):
        measured(TrackError(), batches(noise(2, 3, 4, 8, 8)), batches(noise(2, 3, 4, 8, 8)))
    with pytest.raises(FewstepError, match="same noise"):
        compared(digit_clips("clear", 3)[0], digit_clips("clear", 4)[0])


def test_it_asks_for_pairs() -> None:
    assert TrackError().reference == "pairs"
    assert set(TrackError().better.values()) == {"lower"}
    assert TrackError(7).protocol()["pairs"] == TrackError(7).pairs == 7


def test_acceleration_is_that_of_the_true_tracks_and_grows_with_disorder() -> None:
    pixels, clips = digit_clips("clear", 80, num_frames=8, max_digits=1)
    truth = centres(clips).diff(n=2, dim=1).norm(dim=-1).mean()
    found = measured(TrackAcceleration(), batches(pixels))["track_acceleration"]
    assert found == pytest.approx(float(truth), abs=0.04)
    shuffled = pixels[:, :, torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    values = measured(TrackAcceleration(), batches(shuffled), batches(pixels))
    assert values["track_acceleration_ratio"] > 5
    still = pixels[:, :, :1].expand_as(pixels)
    assert measured(TrackAcceleration(), batches(still))["track_acceleration"] == 0


def test_acceleration_leaves_frames_without_ink_out_and_needs_three_frames() -> None:
    pixels, _ = digit_clips("clear", 8, num_frames=8, max_digits=1)
    black = pixels.clone()
    black[:, :, -1] = -1
    values = [measured(TrackAcceleration(), batches(x)) for x in (black, pixels[:, :, :-1])]
    assert values[0] == pytest.approx(values[1], abs=1e-3)  # the mark is fitted to other frames
    with pytest.raises(FewstepError, match="at least 3 frames"):
        measured(TrackAcceleration(), batches(pixels[:, :, :2]))


def ends(pixels: Tensor, wanted: Tensor) -> dict[str, float]:
    cond = {"end_position": wanted}
    return measured(EndError(), [Samples(pixels, torch.arange(len(pixels)), cond=cond)])


def test_the_end_of_a_clip_is_where_its_digit_is_in_the_last_frame() -> None:
    pixels, clips = digit_clips("watermarked", 30, num_frames=8, max_digits=1)
    where = centres(clips)[:, -1]
    assert ends(pixels, where)["end_error"] < 0.3
    assert ends(pixels, where)["end_reached"] == 1
    far = ends(pixels, where + torch.tensor([3.0, 4.0]))
    assert far["end_error"] == pytest.approx(5, abs=0.3)
    assert far["end_reached"] == 0


def test_a_clip_that_ends_black_is_as_far_away_as_it_is_wide() -> None:
    pixels, _ = digit_clips("clear", 4, num_frames=4, max_digits=1)
    pixels[:, :, -1] = -1
    assert ends(pixels, torch.zeros(4, 2)) == {"end_error": 32.0, "end_reached": 0.0}


def test_an_end_needs_to_be_asked_for() -> None:
    pixels, _ = digit_clips("clear", 4, num_frames=4)
    with pytest.raises(FewstepError, match="'end_position'"):
        measured(EndError(), batches(pixels))
