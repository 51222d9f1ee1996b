from __future__ import annotations

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


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_afterwards_everything_is_as_the_run_chose_it(chosen: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(chosen)
    try:
        found = precisions()
        with pytest.raises(RuntimeError, match="inside"), full_float32(CPU):
            raise RuntimeError("inside")
        assert precisions() == found
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_a_gpu_in_use_metrics_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert compute_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert compute_device() == torch.device("cuda", 3)
