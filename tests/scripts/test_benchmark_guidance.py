"""The benchmark of guidance changes nothing from side to side but the number of views."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fewstep.guidance import PictureNetwork
from scripts.benchmark_guidance import TIMES, main, runs

SIZES = {"size": 8, "width": 32, "vae": 32, "guide": 64, "pixels": 28}
STEPS = len(TIMES) - 1


def test_only_the_guide_sees_every_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps ten views within a quarter of one's time, whatever the machine."""
    seen: Counter[str] = Counter()

    def count(kind: Any, name: str) -> None:
        plain = getattr(kind, name)

        def counted(self: Any, rows: torch.Tensor, *args: Any, **options: Any) -> Any:
            seen[kind.__name__] += len(rows)
            return plain(self, rows, *args, **options)

        monkeypatch.setattr(kind, name, counted)

    count(UNet2DConditionModel, "forward")
    count(AutoencoderKL, "decode")
    count(PictureNetwork, "forward")
    found = {}
    made = runs(argparse.Namespace(**SIZES, device="cpu", batch=1, anew=True))
    for name, run in made.items():
        seen.clear()
        run()
        found[name] = [seen[k] for k in ("UNet2DConditionModel", "AutoencoderKL", "PictureNetwork")]
    assert found == {
        "K = 1": [STEPS, STEPS, STEPS],
        "K = 10": [STEPS, STEPS, 10 * STEPS],
        "K = 20": [STEPS, STEPS, 20 * STEPS],
        "K = 10, decoded anew": [STEPS, 10 * STEPS, 10 * STEPS],
    }


def test_it_prints_a_ratio_for_every_number_of_views(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    main([*sizes, "--device", "cpu", "--blocks", "1"])
    told = capsys.readouterr().out
    assert len(re.findall(r"^K = \d+ +[\d.]+ ms a step +[\d.]+$", told, re.MULTILINE)) == 3
    assert told.count("ms a step    1.000\n") == 1
