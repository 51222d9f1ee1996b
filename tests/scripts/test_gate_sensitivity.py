"""``fewstep gates sensitivity``: what stacks of different depths are like before training."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.errors import FewstepError
from fewstep.networks.gates import ResidualGates, apply_gates
from scripts.gates.sensitivity import Measured, Study, measured, table
from scripts.gates.stacks import BlockStack
from scripts.main import run

WIDTH = 64


def study(networks: Any, inits: Any, depths: list[int], seeds: int) -> dict[Any, Measured]:
    rows = Study(networks, inits, depths, WIDTH, seeds).run()
    return {(row.network, row.init, row.depth): row for row in rows}


@pytest.mark.parametrize("kind", ["pre-LN", "no-norm", "adaLN-Zero"])
def test_gates_that_start_at_one_are_the_ungated_stack_exactly(kind: Any) -> None:
    plain, gated = (BlockStack(kind, 4, WIDTH, seed=0) for _ in range(2))
    apply_gates(gated, ResidualGates(mode="alpha"))
    z = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    results = []
    for stack in (plain, gated):
        leaf = z.clone().requires_grad_(True)
        output = stack(leaf)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
        results.append((output, gradient))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0], z) == (kind == "adaLN-Zero")


def check(networks: dict[Any, Measured], shallow: int, deep: int) -> None:
    """What is true of the table between two depths, with margins for other seeds."""
    ratio = deep / shallow

    def pair(kind: str, init: str) -> tuple[Measured, Measured]:
        return networks[(kind, init, shallow)], networks[(kind, init, deep)]

    # Pre-LN with alpha at 1 grows as a power of the depth, about 1/2 and 0.7.
    before, after = pair("pre-LN", "identity")
    assert 0.3 < math.log(after.growth / before.growth, ratio) < 0.7
    assert 0.3 < math.log(after.amplification / before.amplification, ratio) < 1.0
    # 1 / sqrt(2L) is flat, normalised or not; what is not normalised explodes without.
    for kind in ("pre-LN", "no-norm"):
        before, after = pair(kind, "depth")
        assert after.growth == pytest.approx(before.growth, rel=0.05)
        assert after.amplification == pytest.approx(before.amplification, rel=0.05)
        assert 1 < after.amplification < 1.3
    before, after = pair("no-norm", "identity")
    assert not after.amplification < 1e4 * before.amplification
    # The error: in a bfloat16 stream it grows with the depth whatever alpha starts at, unless 0.
    for init in ("identity", "depth"):
        before, after = pair("pre-LN", init)
        assert after.error > 1.3 * before.error
    before, after = pair("pre-LN", "zero")
    assert before.error == pytest.approx(after.error, rel=0.1)
    assert after.error_wide == 0
    # Only a float32 stream and small gates together free it of the depth.
    before, after = pair("pre-LN", "depth")
    assert after.error_wide == pytest.approx(before.error_wide, rel=0.15)
    assert before.error_wide < 0.6 * before.error
    assert after.error_wide < 0.35 * after.error
    assert after.error_wide < 0.6 * pair("pre-LN", "identity")[1].error_wide
    before, after = pair("pre-LN", "ode")
    assert after.error_wide < 0.7 * before.error_wide


INITS = ("identity", "depth", "ode", "zero")


@pytest.mark.slow
def test_what_gates_do_to_sensitivity_and_rounding_between_4_and_16_blocks() -> None:
    check(study(["pre-LN", "no-norm"], INITS, [4, 16], seeds=1), 4, 16)


@pytest.mark.slow
@pytest.mark.parametrize("deep", [64, 128])
def test_what_gates_do_to_sensitivity_and_rounding_in_deep_stacks(deep: int) -> None:
    check(study(["pre-LN", "no-norm"], INITS, [4, deep], seeds=2), 4, deep)


def test_blocks_of_adaln_zero_are_the_identity_whatever_gates_start_at() -> None:
    for init in ("identity", "depth"):
        one = measured("adaLN-Zero", init, 3, WIDTH, seed=0)
        assert (one.growth, one.amplification, one.error_wide) == (1, 1, 0)
    with pytest.raises(FewstepError, match="can never train"):
        measured("adaLN-Zero", "zero", 3, WIDTH, seed=0)


def test_the_command_prints_and_writes_its_table_and_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--networks", "pre-LN", "adaLN-Zero", "--depths", "2", "1", "--width", "16"]
    run(["gates", "sensitivity", *options, "--seeds", "2", "--dest", str(tmp_path / "out")])
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * (4 + 3)  # adaLN-Zero with alpha at 0 is left out
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].split("|")[1:4] == [" pre-LN     ", " 1          ", "      1 "]
    assert (tmp_path / "out" / "sensitivity.md").read_text().splitlines() == lines
    with (tmp_path / "out" / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seeds = [measured("pre-LN", "depth", 2, 16, seed) for seed in range(2)]
    mean = sum(one.amplification for one in seeds) / 2
    row = next(r for r in rows if (r["network"], r["init"], r["depth"]) == ("pre-LN", "depth", "2"))
    assert float(row["amplification"]) == pytest.approx(mean)
    with Image.open(tmp_path / "out" / "sensitivity.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(FewstepError, match="multiple of 16"):
        run(["gates", "sensitivity", "--width", "20", "--dest", str(tmp_path / "other")])
    with pytest.raises(FewstepError, match="at least 1"):
        run(["gates", "sensitivity", "--seeds", "0", "--dest", str(tmp_path / "other")])


def test_numbers_that_are_not_finite_are_said_to_be_so() -> None:
    row = Measured("no-norm", "identity", 128, math.inf, math.nan, math.nan, 0.25)
    assert table([row]).count("not finite") == 3
