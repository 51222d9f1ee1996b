"""What happened in a guided run, step by step and sample by sample."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError

LARGEST_MOVE = 10.0
"""In units of the standard deviation of the initial noise. Of the steps that were looked at, those
that led anywhere moved by 4 at the most, and those that diverged by 100 and more."""


@dataclass(frozen=True)
class Costs:
    """What a run cost, for each sample.

    Attributes:
        denoiser_evaluations: of the denoiser; one that is guided by a scale counts once.
        denoiser_gradients: backward passes through it.
        energy_evaluations: of the energy, with or without a backward pass.
        seconds: wall clock of the whole batch, which two runs with the same costs may differ in.
    """

    denoiser_evaluations: int
    denoiser_gradients: int
    energy_evaluations: int
    seconds: float = field(default=0.0, compare=False)

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.denoiser_evaluations + other.denoiser_evaluations,
            self.denoiser_gradients + other.denoiser_gradients,
            self.energy_evaluations + other.energy_evaluations,
            self.seconds + other.seconds,
        )

    def for_each_of(self, count: int) -> Costs:
        """What each of the samples cost that ``count`` rows of one batch were tries of."""
        return Costs(
            self.denoiser_evaluations * count,
            self.denoiser_gradients * count,
            self.energy_evaluations * count,
            self.seconds,
        )


@dataclass(frozen=True)
class Trace:
    """``R`` guided rounds (steps, with their repetitions) of ``B`` samples.

    Lengths are in variance-preserving coordinates and per element (root mean squares), so that
    they compare with a standard deviation of 1 whatever the size of a sample.

    Attributes:
        times: of the rounds, in the network's own unit.
        loss: smoothed and augmented, before the round's displacement, ``(R, B)``.
        gradient_norm: Euclidean norm of the gradient, ``(R, B)``: with respect to the noisy state
            if the guidance has a rule for it, else to the clean estimate.
        displacement: how far guidance moved the state, ``(R, B)``.
        alignment: cosine of a gradient and that of the round before; 0 for the first, ``(R, B)``.
        nonfinite: whether a loss, gradient or displacement was not finite and was left out,
            ``(R, B)``.
        finished: whether the sample is finite, ``(B,)``.
        costs: what the run cost.
    """

    times: tuple[float, ...]
    loss: Tensor
    gradient_norm: Tensor
    displacement: Tensor
    alignment: Tensor
    nonfinite: Tensor
    finished: Tensor
    costs: Costs

    def check(self, largest_move: float = LARGEST_MOVE) -> None:
        """Refuses a run that went wrong; the one place that waits for the device.

        Raises:
            FewstepError: if a displacement was larger than ``largest_move``, or if anything was
                not finite.
        """
        if not len(self.times):
            return
        moved = float(self.displacement.max())
        broken = int(self.nonfinite.any(0).logical_or(~self.finished).sum())
        if moved > largest_move:
            index = int(self.displacement.amax(1).gt(largest_move).nonzero()[0])
            raise FewstepError(
                f"Guidance diverged: at t = {self.times[index]:g} it moved a sample by more than "
                f"{largest_move:g} standard deviations of the noise (at most {moved:.3g} in the "
                "whole run). Wrap the step rule in Capped, or lower its strength."
            )
        if broken:
            raise FewstepError(
                f"Guidance met losses or gradients that are not finite in {broken} of "
                f"{len(self.finished)} samples. Look for logarithms and divisions in the energy, "
                "compute it in float32, and wrap the step rule in Capped."
            )


class Clock:
    """The time that a run takes, up to its latest lap.

    On a CUDA device it is the device's own: nothing waits before the time is read.

    Args:
        device: where the run takes place.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._began: Any = self._now()
        self._last = self._began

    def lap(self) -> None:
        """The time goes up to here."""
        self._last = self._now()

    def seconds(self) -> float:
        """From the beginning to the latest lap; waits until the device has come there."""
        if self._stream is None:
            return float(self._last - self._began)
        self._last.synchronize()
        return float(self._began.elapsed_time(self._last)) / 1000

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


@dataclass
class Recorder:
    """Collects a trace without waiting for the device."""

    times: list[float] = field(default_factory=list)
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)
    previous: Tensor | None = None
    denoiser_evaluations: int = 0
    denoiser_gradients: int = 0
    energy_evaluations: int = 0
    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))

    def note(
        self, at: float, loss: Tensor, gradient: Tensor, shift: Tensor, nonfinite: Tensor
    ) -> None:
        """Adds one guided round.

        Args:
            at: its time, in the network's own unit.
            loss: ``(B,)``.
            gradient: ``(B, ...)``.
            shift: what was subtracted from the state, ``(B, ...)``.
            nonfinite: ``(B,)`` bool.
        """
        flat = gradient.flatten(1)
        before = torch.zeros_like(flat) if self.previous is None else self.previous
        alignment = torch.cosine_similarity(flat, before, dim=1)
        moved = shift.flatten(1).square().mean(1).sqrt()
        norm = torch.linalg.vector_norm(flat, dim=1)
        self.times.append(at)
        self.rows.append((loss, norm, moved, alignment, nonfinite))
        self.previous = flat

    def trace(self, samples: Tensor) -> Trace:
        """The trace of a run that ended with ``samples (B, ...)``, with the time of its laps."""
        empty = samples.new_zeros((0, len(samples)))
        columns = [torch.stack(column) for column in zip(*self.rows, strict=True)] or [empty] * 5
        loss, norm, moved, alignment, nonfinite = columns
        return Trace(
            times=tuple(self.times),
            loss=loss,
            gradient_norm=norm,
            displacement=moved,
            alignment=alignment,
            nonfinite=nonfinite,
            finished=samples.flatten(1).isfinite().all(1),
            costs=Costs(
                self.denoiser_evaluations,
                self.denoiser_gradients,
                self.energy_evaluations,
                self.clock.seconds(),
            ),
        )

    def close(self, samples: Tensor, largest_move: float | None) -> Trace:
        """The trace of a run that ended with ``samples (B, ...)``, with the time until now.

        Args:
            largest_move: see :meth:`Trace.check`; None leaves the check out.
        """
        self.clock.lap()
        trace = self.trace(samples)
        if largest_move is not None:
            trace.check(largest_move)
        return trace
