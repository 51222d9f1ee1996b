from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fewstep.metrics.arithmetic import compute_device, full_float32

CPU = torch.device("cpu")
BACKENDS: Any = torch.backends


def precisions() -> list[str]:
    places = (BACKENDS.cudnn.conv, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv)
    return [place.fp32_precision for place in (*places, BACKENDS.mkldnn.matmul)]


def test_nothing_stands_in_for_float32_within() -> None:
    values = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (values @ values).dtype == torch.bfloat16
        with full_float32(CPU):
            assert precisions() == ["ieee"] * 4
            assert torch.equal(values @ values, values @ values)
            assert (values @ values).dtype == torch.float32


@contextmanager
def run_that_chose(precision: str) -> Iterator[None]:
    """A run's precision of matrix products, in PyTorch's older way."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_afterwards_everything_is_as_the_run_chose_it(chosen: str) -> None:
    with run_that_chose(chosen):
        found = precisions()
        with pytest.raises(RuntimeError, match="inside"), full_float32(CPU):
            raise RuntimeError("inside")
        assert precisions() == found
        assert torch.get_float32_matmul_precision() == chosen


def older_answers() -> list[object]:
    """What the older way to ask says, or that it refuses."""
    found: list[object] = []
    for ask in (
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
    ):
        try:
            found.append(ask())
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_pytorchs_older_questions_are_answered_within(chosen: str) -> None:
    with run_that_chose(chosen):
        outside = older_answers()
        with full_float32(CPU):
            assert older_answers() == ["highest", False, False]
        assert older_answers() == outside


def test_a_run_that_chose_in_pytorchs_newer_way_finds_its_choice_again() -> None:
    with run_that_chose("highest"):
        BACKENDS.cuda.matmul.fp32_precision = "tf32"  # the older way to ask now refuses
        with full_float32(CPU):
            assert precisions() == ["ieee"] * 4
        assert BACKENDS.cuda.matmul.fp32_precision == "tf32"


def test_without_a_gpu_in_use_metrics_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert compute_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert compute_device() == torch.device("cuda", 3)
