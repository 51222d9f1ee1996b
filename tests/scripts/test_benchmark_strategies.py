"""The benchmark of strategies compares like with like, and ends with whatever goes wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from scripts.benchmark_strategies import cases_of, main, parser
from scripts.benchmarks.contestants import (
    Case,
    RandomData,
    Settings,
    make_method,
    network,
    place,
    plain_module,
    plain_step,
    trainer_of,
)
from scripts.benchmarks.launch import launch
from scripts.benchmarks.memory import PeakMemory
from scripts.benchmarks.rank import own_line
from scripts.benchmarks.table import name_of

TINY = Settings(width=16, layers=2, size=8, batch=4, threads=1, blocks=2, steps=1)
TINY_OPTIONS = [
    *("--device", "cpu", "--width", "16", "--layers", "2", "--size", "8", "--batch", "4"),
    *("--threads", "1", "--blocks", "2", "--steps", "1"),
]
UPDATES = 6


def changes(module: nn.Module, start: nn.Module) -> list[Tensor]:
    before = dict(start.named_parameters())
    return [(p - before[name]).detach() for name, p in module.named_parameters()]


def far_apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference relative to what a tensor moved."""
    return max(
        float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True) if b.any()
    )


def test_the_straightforward_loop_computes_the_weights_that_ours_does(tmp_path: Path) -> None:
    case, device = Case("single", "pcm"), torch.device("cpu")
    pl.seed_everything(0, verbose=False)
    ours, theirs = make_method(case, TINY), plain_module(case, TINY, device)
    ours.ema_decay = theirs.ema_decay = 0.5  # nearer to 1, averages move by no more than rounding
    trainer_of(case, TINY, UPDATES, tmp_path).fit(ours, RandomData(TINY, 0))

    step = plain_step(theirs, case, rank=0)
    batches = iter(RandomData(TINY, 0))
    for update in range(UPDATES):
        step(place(next(batches), device), update)

    start = network(TINY)
    for role in ("student", "ema"):
        one, other = (getattr(module, role).backbone for module in (ours, theirs))
        moved = changes(one, start)
        assert sum(bool(change.any()) for change in moved) > 0.9 * len(moved)
        assert far_apart(changes(other, start), moved) < 0.02, role
    assert ours.teacher.backbone.state_dict().keys() == start.state_dict().keys()
    for module in (ours, theirs):
        assert not any(change.any() for change in changes(module.teacher.backbone, start))


def table_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[list[dict[str, Any]], str]:
    main([*TINY_OPTIONS, *options, "--json", str(tmp_path / "found.json")])
    return json.loads((tmp_path / "found.json").read_text())["rows"], capsys.readouterr().out


def assert_sound(
    rows: list[dict[str, Any]], printed: str, strategy: str, methods: set[str]
) -> None:
    """All asked rows are there, with positive numbers, and are printed."""
    mine = {row["measured"]: row for row in rows if row["strategy"] == strategy}
    kind = "sharded folder" if strategy == "fsdp2" else "one file"
    steps = {f"step, {method}" for method in methods}
    assert set(mine) == steps | {"EMA update", f"checkpoint, {kind}"}
    for name, row in mine.items():
        assert row["seconds"] > 0, name
        assert any(line.startswith(strategy) and name in line for line in printed.splitlines())
    for name in steps:
        assert mine[name]["samples"] > 0
        assert mine[name]["bytes"] > 0
    assert mine["step, pcm"]["planned_bytes"] > 0
    for name in ("step, pcm", "EMA update", f"checkpoint, {kind}"):
        assert mine[name]["ratio"] == mine[name]["plain_seconds"] / mine[name]["seconds"] > 0
    saved = mine[f"checkpoint, {kind}"]
    assert saved["bytes"] > 0
    assert saved["plain_bytes"] > 0


@pytest.mark.slow
def test_one_process_measures_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, printed = table_of(tmp_path, capsys, "--strategies", "single")
    assert_sound(rows, printed, "single", {"teacher", "lcm", "pcm", "pcm_adversarial"})


def test_variants_are_of_pcm_alone_and_the_first_has_the_details() -> None:
    options = ["--strategies", "ddp", "--methods", "teacher", "pcm", "--compile", "off", "on"]
    cases = cases_of(parser().parse_args([*options, "--precision", "32-true", "bf16-mixed"]))
    names = [(name_of(case), case.detailed) for case in cases]
    assert names == [
        ("teacher", False),
        ("pcm", True),
        ("pcm, compiled", False),
        ("pcm, bf16-mixed", False),
        ("pcm, bf16-mixed, compiled", False),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_bf16_and_compilation_are_measured_beside_a_loop_in_bf16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    variant = ("--methods", "pcm", "--precision", "bf16-mixed", "--compile", "on")
    rows, _ = table_of(tmp_path, capsys, "--strategies", strategy, *variant)
    assert rows[0]["measured"] == "step, pcm, bf16-mixed, compiled"
    assert rows[0]["ratio"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_measure_replicated_and_sharded_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, printed = table_of(tmp_path, capsys, "--strategies", "ddp", "fsdp2")
    for strategy in ("ddp", "fsdp2"):
        assert_sound(rows, printed, strategy, {"teacher", "lcm", "pcm", "pcm_adversarial"})
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert [len(case["ranks"]) for case in found] == [2] * 8
    # A replicated student holds all of its optimiser's states, a sharded one about half.
    states = [c["ranks"][0]["roles"]["student"]["optimizer"] for c in found if c["detailed"]]
    assert 0.4 < states[1] / states[0] < 0.6


def fail_on_the_second_rank() -> None:
    import os

    if os.environ["RANK"] == "1":
        raise ValueError("a deliberate failure")
    time.sleep(600)


def test_a_failing_rank_ends_the_others_with_its_error() -> None:
    begun = time.monotonic()
    with pytest.raises(FewstepError, match="a deliberate failure"):
        launch(fail_on_the_second_rank, 2, "cpu")
    assert time.monotonic() - begun < 60


def test_ranks_give_what_they_found_in_their_order() -> None:
    assert launch(rank_and_world, 2, "cpu") == [["0", "2"], ["1", "2"]]


def rank_and_world() -> list[str]:
    import os

    return [os.environ["RANK"], os.environ["WORLD_SIZE"]]


def peak_of_a_passing_tensor() -> list[int]:
    torch.set_num_threads(1)
    earlier = torch.ones(64 * 2**20)
    peak = PeakMemory("cpu")
    del earlier
    peak.restart()
    kept = torch.ones(2**20)
    nothing = peak.read()
    passing = torch.ones(96 * 2**20)  # 384 MiB beside the 256 MiB that are gone
    del passing, kept
    return [nothing, peak.read()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_peak_is_that_since_the_restart() -> None:
    (found,) = launch(peak_of_a_passing_tensor, 1, "cpu")
    nothing, peak = found
    assert nothing < 0
    assert peak == pytest.approx((384 + 4 - 256) * 2**20, rel=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "100"], "multiple of 64"),
        (["--size", "7"], "patches"),
        (["--blocks", "0"], "--blocks must be at least 1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["--device", "cpu", *options])


def test_the_line_that_waited_is_the_innermost_of_this_project() -> None:
    with pytest.raises(TypeError) as caught:
        Settings(**{"unknown": 1})
    assert own_line(caught.value).startswith("tests/scripts/test_benchmark_strategies.py:")
    assert own_line(caught.value).endswith('Settings(**{"unknown": 1})')
