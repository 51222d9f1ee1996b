"""Whether digits move along the same tracks in samples of the same noise, however they look."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.amounts import Amount
from fewstep.metrics.base import Better, Metric, Reference, Samples, Statistics
from fewstep.metrics.means import Means
from fewstep.metrics.moving_digits import light, unmarked
from fewstep.metrics.pairs import Paired
from fewstep.metrics.rows import Rows

logger = logging.getLogger(__name__)

TRACKS = "tracks"
FAINT = 0.1  # light that is taken for background
LEAST_INK = 1.0  # pixels of full light: less is no digit


def tracks(pixels: Tensor) -> Tensor:
    """The centre of the ink in each frame, ``(B, F, 2)`` x and y in pixels from the top left one.

    The mark is taken off first, and light below a tenth. A blur that is the same all around hardly
    moves a centre. Where there are two digits it is their common one.

    Args:
        pixels: grey videos ``(B, 1, F, H, H)`` in [-1, 1].

    Returns:
        float64; NaN in frames without ink.
    """
    ink = (unmarked(light(pixels)) - FAINT).clamp_min(0)
    places = torch.arange(ink.shape[-1], dtype=ink.dtype, device=ink.device)
    total = ink.sum((-1, -2))
    sums = torch.stack([(ink.sum(-2) * places).sum(-1), (ink.sum(-1) * places).sum(-1)], -1)
    return torch.where(total >= LEAST_INK, 1.0, torch.nan)[..., None] * sums / total[..., None]


class TrackAcceleration(Amount):
    """``track_acceleration``: how much the ink's velocity changes from frame to frame.

    Mean length in pixels a frame, squared; frames without ink are left out. Digits go straight on
    and bounce now and then, so the data's own is small, and jerks or jumps raise it. It needs no
    partner: unlike :class:`TrackError` it also judges samplers that draw noise on their way, whose
    samples rightly leave the teacher's.
    """

    nothing = "The reference's digits never change their velocity"

    def __init__(self) -> None:
        super().__init__("track_acceleration")
        self.better[self.name] = self.better[f"{self.name}_ratio"] = "lower"

    def amounts(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        _check_video(samples, least=3)
        changes = tracks(samples.pixels).diff(n=2, dim=1).norm(dim=-1)
        return [changes.nanmean(1).nan_to_num(0.0)]


def _check_video(samples: Samples, least: int) -> None:
    if samples.pixels.ndim != 5 or samples.pixels.shape[2] < least:
        raise FewstepError(
            f"Tracks take videos of at least {least} frames here; the samples are "
            f"{tuple(samples.pixels.shape)}."
        )


class TrackRows(Rows):
    """Tracks of a bounded number of videos."""

    of_samples = True

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        _check_video(samples, least=2)
        super().update({**features, TRACKS: tracks(samples.pixels)}, samples)


class EndError(Metric):
    """Does a digit end where it was to? ``end_error``, the mean distance in pixels.

    Of the ink's centre in the last frame, as :func:`tracks` measures it, from the point that the
    sample was asked to end at. A last frame without ink is as far away as the frame is wide.
    ``end_reached`` is the share of samples within ``near`` pixels.

    Args:
        target: name of the condition that tells the point, ``(B, 2)`` x and y in pixels.
        near: pixels.
    """

    reference: ClassVar[Reference] = "none"
    name = "end_error"

    def __init__(self, target: str = "end_position", near: float = 1.0) -> None:
        self.target, self.near = target, near
        self.needs_conditions = (target,)
        self.better: dict[str, Better] = {"end_error": "lower", "end_reached": "higher"}
        self.own_values = frozenset(self.better)

    def statistics(self) -> Means:
        return Means(["end_error", "end_reached"], self._errors)

    def _errors(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        _check_video(samples, least=1)
        if samples.cond is None or self.target not in samples.cond:
            raise FewstepError(
                f"EndError compares with each sample's '{self.target}', which these samples were "
                "not given; leave it out of the Evaluation callback's `metrics`."
            )
        ends = tracks(samples.pixels)[:, -1]
        missed = (ends - samples.cond[self.target].to(ends)).norm(dim=-1)
        errors = missed.nan_to_num(float(samples.pixels.shape[-1]))
        return [errors, errors <= self.near]

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        return generated.means()

    def protocol(self) -> dict[str, Any]:
        return {
            "metric": self.name,
            "target": self.target,
            "near": self.near,
            "pixels": "8-bit",
            "faint": FAINT,
            "least_ink": LEAST_INK,
        }


class TrackError(Paired):
    """How far apart digits are in two videos of the same noise, the mark and blur apart.

    ``track_error``: mean distance of the ink's centres, in pixels. ``velocity_error``: the same of
    their steps from frame to frame, in pixels a frame. ``tracks_lost``: share of the frames in
    which one of the two has ink and the other none; they are left out of the other values, as are
    frames in which neither has any.

    Args:
        pairs: to compare.
    """

    def __init__(self, pairs: int = 256) -> None:
        super().__init__("track_error", TRACKS, "lower", pairs)
        self.better |= {"velocity_error": "lower", "tracks_lost": "lower"}

    def statistics(self) -> TrackRows:
        return TrackRows([self.output], self.pairs)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Mean distances ``(N,)`` over frames of tracks ``(N, F, 2)``; NaN if none has both."""
        return (first - second).norm(dim=-1).nanmean(1)

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        """The means over all pairs; where none has a common frame, ``tracks_lost`` alone."""
        first, second = self.paired(generated, reference)
        there = [~each.isnan().any(-1) for each in (first, second)]
        values = {
            self.name: self.compare(first, second).nanmean(),
            "velocity_error": self.compare(first.diff(dim=1), second.diff(dim=1)).nanmean(),
            "tracks_lost": (there[0] != there[1]).double().mean(),
        }
        missing = [name for name, value in values.items() if value.isnan()]
        if missing:
            logger.warning("%s: no frames of a pair have ink in both videos.", ", ".join(missing))
        return {name: float(value) for name, value in values.items() if name not in missing}

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "pixels": "8-bit", "faint": FAINT, "least_ink": LEAST_INK}
