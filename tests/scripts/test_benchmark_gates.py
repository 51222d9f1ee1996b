"""The benchmark of gates compares the same network on all sides."""

from __future__ import annotations

import argparse
import re

import pytest
import torch

from fewstep.networks.gates import is_gated
from scripts.benchmark_gates import contestants, evaluated, main

SIZES = {"size": 8, "width": 32, "layers": 1}


def test_all_sides_compute_the_same_but_for_what_was_merged() -> None:
    torch.manual_seed(0)
    found = contestants(argparse.Namespace(**SIZES, device="cpu", compile=False))
    assert {name: is_gated(network) for name, network in found.items()} == {
        "ungated": False,
        "branches": True,
        "blocks": True,
        "merged": False,
    }
    labels = {"class_labels": torch.tensor([1, 2])}
    sample = torch.randn(2, 4, 8, 8)
    for network in found.values():
        torch.nn.init.eye_(network.transformer.proj_out_2.weight)
    outputs = {
        name: evaluated(network, {"sample": sample, "cond": labels, "key": []}, None)
        for name, network in found.items()
    }
    for name in ("branches", "blocks"):
        assert torch.equal(outputs[name], outputs["ungated"])
    weights = {n: f.transformer.transformer_blocks[0].ff.net[2].weight for n, f in found.items()}
    torch.testing.assert_close(weights["merged"], 1.01 * weights["ungated"])


def test_it_prints_a_ratio_for_every_side(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    main([*sizes, "--device", "cpu", "--batch", "2", "--blocks", "1", "--length", "1"])
    told = capsys.readouterr().out
    assert len(re.findall(r"^  \w+ +[\d.]+ ms +[\d.]+$", told, re.MULTILINE)) == 8
    assert told.count(" ms   1.000\n") >= 2
