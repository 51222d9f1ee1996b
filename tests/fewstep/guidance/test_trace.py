from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance import (
    Capped,
    Guidance,
    Normalised,
    Polyak,
    guided_sample,
)
from fewstep.guidance.trace import Clock

from guided import MATRIX, NOISE, TARGET, TIMES


def run_first_step(net: Any) -> Tensor:
    """Where a normalised step leads."""
    guidance = Guidance(MATRIX, Normalised(0.2))
    return guided_sample(net, NOISE, None, TIMES[:2], guidance, TARGET).samples


def test_the_trace_says_what_happened(net: Any) -> None:
    guidance = Guidance(MATRIX, Normalised(0.2))
    run = guided_sample(net, NOISE, None, TIMES, guidance, TARGET)
    x0 = net(NOISE, torch.full((3,), 999.0).double()).x0
    torch.testing.assert_close(run.trace.loss[0], MATRIX(x0, TARGET))
    # 0.2 in length is 0.1 for each of four elements.
    torch.testing.assert_close(run.trace.displacement, torch.full((4, 3), 0.1).double())
    assert run.trace.alignment[0].tolist() == [0.0] * 3
    first, second = (
        torch.autograd.grad(MATRIX(net(x, t.expand(3)).x0, TARGET).sum(), x)[0]
        for x, t in zip(
            (NOISE.clone().requires_grad_(), run_first_step(net).requires_grad_()),
            TIMES[:2],
            strict=True,
        )
    )
    torch.testing.assert_close(
        run.trace.alignment[1], torch.cosine_similarity(first, second, dim=1)
    )
    assert bool((run.trace.gradient_norm > 0).all())


@pytest.mark.parametrize("strength", [1e3, 1e200])
def test_a_diverging_step_is_refused_with_advice_and_a_capped_one_is_not(
    net: Any, strength: float
) -> None:
    rule = Polyak(strength, "eps_norm")
    with pytest.raises(FewstepError, match=r"diverged: at t = 999 .* Capped"):
        guided_sample(net, NOISE, None, TIMES, Guidance(MATRIX, rule), TARGET)
    run = guided_sample(net, NOISE, None, TIMES, Guidance(MATRIX, Capped(rule, 0.1)), TARGET)
    assert run.trace.displacement.max() <= 0.1
    assert run.samples.abs().max() < 100


class Marker:
    """An event on a device whose clock is a list of calls."""

    calls: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0

    def record(self, stream: object) -> None:
        self.calls.append(f"record on {stream}")
        self.at = len(self.calls)

    def synchronize(self) -> None:
        self.calls.append("wait")

    def elapsed_time(self, end: Marker) -> float:
        return 1000.0 * (end.at - self.at)


def test_a_device_is_waited_for_only_when_the_time_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Marker)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{device}'s")
    clock = Clock(torch.device("cuda"))
    clock.lap()
    clock.lap()
    assert Marker.calls == ["record on cuda's"] * 3
    assert clock.seconds() == 2
    assert Marker.calls[3:] == ["wait"]


def test_a_clock_stands_still_between_laps() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.seconds() == 0
    clock.lap()
    assert clock.seconds() == clock.seconds() > 0
