"""Replicated and sharded training against a single device on the same global batches."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.networks.loading import load_denoiser, newest_checkpoint
from fewstep.networks.lora import LoRA
from lightning_modules.parallel import ShardedStrategy

from ranks import run_ranks
from training_runs import assert_same_run, run, trained


@pytest.mark.parametrize(
    "name",
    [
        *("teacher", "adversarial", "mcm"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lcm", "pcm", "apt")),
    ],
)
@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [
        *(("ddp", 1), ("fsdp", 4)),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one_device_does(kind: str, name: str, accumulate: int) -> None:
    ((alone, losses, _),) = trained(1, "single", name, accumulate=accumulate)
    first, second = trained(2, kind, name, accumulate=accumulate)
    assert first[2] == (kind == "fsdp")
    assert alone.keys() == first[0].keys()
    for parameter, expected in alone.items():
        torch.testing.assert_close(first[0][parameter], expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(first[0][parameter], second[0][parameter]), parameter
    for mine, expected_losses in zip(first[1], losses, strict=True):
        assert mine == pytest.approx(expected_losses, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_ranks_of_which_only_some_generate_trajectories_train_adapters_as_one_device_does(
    kind: str,
) -> None:
    """A video in four is generated, so that some updates have none of them on one of the ranks."""
    options = {"lora": LoRA(rank=2), "generated_share": 0.25}
    (alone,) = trained(1, "single", "mcm", **options)
    for rank in trained(2, kind, "mcm", **options):
        assert_same_run(rank, alone)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


WORLD = {"single": 1, "ddp": 2, "fsdp": 2}
KILLED_FAST = {("single", "mcm"), ("single", "apt")}  # the rest by other tests of resumption


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in KILLED_FAST else pytest.mark.slow)
        for kind in WORLD
        for name in ("teacher", "lcm", "pcm", "adversarial", "mcm", "apt")
    ],
)
def test_a_killed_run_is_bit_equal_to_the_undisturbed_one(
    tmp_path: Path, kind: str, name: str
) -> None:
    world = WORLD[kind]
    undisturbed = run_ranks(world, run, tmp_path / "whole", kind, world, name, 12)
    killed = tmp_path / "killed"
    run_ranks(world, run, killed, kind, world, name, 12, 7, dies=True)
    last = newest_checkpoint(killed)
    assert last is not None
    assert last.resolve().name == "update_00000005.ckpt"
    assert last.is_dir() == (kind == "fsdp")
    resumed = run_ranks(world, run, killed, kind, world, name, 12, None, last)
    for (states, losses), (expected, all_losses) in zip(resumed, undisturbed, strict=True):
        assert_equal(states, expected)
        assert losses == all_losses[5:]
        assert any("exp_avg_sq" in key for key in states)


class Moment:
    """True from some time after a life's first checkpoint on."""

    def __init__(self, folder: Path, resume: Path | None, lifetime: float) -> None:
        self.folder, self.lifetime = folder, lifetime
        self.resumed = None if resume is None else resume.resolve()
        self.begun: float | None = None

    def __call__(self) -> bool:
        newest = max(self.folder.glob("update_*.ckpt"), default=None)
        if self.begun is None and newest not in (None, self.resumed):
            self.begun = time.monotonic()
        return self.begun is not None and time.monotonic() - self.begun > self.lifetime


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [("single", 14), ("fsdp", 6)])
def test_a_run_killed_at_any_moment_of_saving_is_resumable(
    tmp_path: Path, kind: str, times: int
) -> None:
    """Every update is saved, so nearly every moment is one of saving."""
    moments = random.Random(0)
    world, folder = WORLD[kind], tmp_path / "checkpoints"
    before = 0
    for _ in range(times):
        resume = newest_checkpoint(tmp_path)
        moment = Moment(folder, resume, moments.uniform(0, 0.4))
        given = (tmp_path, kind, world, "lcm", 10**6, None, resume, 1)
        run_ranks(world, run, *given, dies=True, kill_when=moment)
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        update = int(newest.resolve().stem.removeprefix("update_"))
        assert update > before
        before = update
    saved = load_denoiser(tmp_path)
    assert all(p.isfinite().all() for p in saved.denoiser.parameters())


FAST = {("fsdp", 4, "ddp")}
WAYS = [
    pytest.param(kind, world, there, marks=() if (kind, world, there) in FAST else pytest.mark.slow)
    for kind, world in [("single", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 4)]
    for there in ("single", "ddp", "fsdp")
]


@pytest.mark.parametrize(("kind", "world", "there"), WAYS)
def test_a_checkpoint_is_loaded_into_any_number_of_ranks(
    tmp_path: Path, there: str, kind: str, world: int
) -> None:
    """Five updates and no more: what is loaded must be what was saved."""
    saved, *_ = run_ranks(WORLD[there], run, tmp_path, there, WORLD[there], "adversarial", 5)
    last = newest_checkpoint(tmp_path)
    loaded = run_ranks(world, run, tmp_path / "other", kind, world, "adversarial", 5, None, last)
    for states, _ in loaded:
        assert_equal(states, saved[0])


@pytest.mark.slow
def test_a_sharded_checkpoint_serves_as_a_teacher(tmp_path: Path) -> None:
    (states, _), _ = run_ranks(2, run, tmp_path, "fsdp", 2, "teacher", 5)
    loaded = load_denoiser(tmp_path)
    assert loaded.role == "ema"
    for name, value in loaded.denoiser.named_parameters("ema"):
        assert torch.equal(value, states[name])


def test_a_sharded_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    run_ranks(2, run, tmp_path, "fsdp", 2, "lcm", 5)

    def other() -> str:
        with pytest.raises(FewstepError) as caught:
            run(tmp_path / "other", "fsdp", 2, "pcm", 6, None, newest_checkpoint(tmp_path))
        return str(caught.value)

    for message in run_ranks(2, other):
        assert "of another experiment" in message
        assert "method: 'ConsistencyDistillation' in the checkpoint" in message


@pytest.mark.parametrize("replicas", [0, 3, 4])
def test_devices_that_cannot_be_divided_among_copies_are_refused(replicas: int) -> None:
    strategy = ShardedStrategy(replicas=replicas)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(FewstepError, match=f"2 devices cannot be divided among {replicas} copies"):
        strategy.setup_environment()
