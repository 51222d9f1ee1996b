"""Guidance through networks that are sharded over ranks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from fewstep.guidance import ClassLabel, DiffAugment, augmented_polyak
from fewstep.seeding import torch_generator
from lightning_modules import Steering

from ranks import run_ranks
from training_runs import assert_same_run, data_for, method, trainer_of, whole

COUNT = 8


def steering() -> Steering:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        guide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    return Steering(augmented_polyak(ClassLabel(guide), 0.1, DiffAugment(2), cap=0.2))


class Samples(pl.Callback):
    """This rank's share of the samples, drawn after every update."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        share = COUNT // trainer.world_size
        rows = range(trainer.global_rank * share, (trainer.global_rank + 1) * share)
        noise = [torch.randn(1, 8, 8, generator=torch_generator(0, "n", row)) for row in rows]
        draws = [torch_generator(0, "sampler", row) for row in rows]
        labels = {"class_labels": torch.tensor(rows) % 10}
        for role in ("student", "ema"):
            self.drawn.append(module.sample(torch.stack(noise), labels, 2, draws, role))
        assert module.steered.failure is None


def train(kind: str, world: int, steered: bool) -> Any:
    """What :func:`training_runs.train` returns, and the samples."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module, samples = method("lcm"), Samples()
    if steered:
        module.steer(steering())
    trainer = trainer_of(kind, world, 2, *([samples] if steered else []))
    trainer.fit(module, data_for("lcm"))
    weights = {n: whole(p) for n, p in module.student.named_parameters()}
    asking = {n for n, p in module.named_parameters() if p.requires_grad}
    return (weights, [], asking), samples.drawn


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_samples_are_steered_between_updates_as_on_one_device_and_training_goes_on(
    kind: str,
) -> None:
    plain, _ = train("single", 1, steered=False)
    alone, expected = train("single", 1, steered=True)
    assert_same_run(alone, plain, rtol=0, atol=0)
    found: Any = run_ranks(2, train, kind, 2, True)
    for run, _ in found:
        assert_same_run(run, plain)
        assert run[2] == plain[2]  # what is trained still asks for gradients, the rest does not
    for number, wanted in enumerate(expected):
        both = torch.cat([samples[number] for _, samples in found])
        torch.testing.assert_close(both, wanted, rtol=1e-3, atol=1e-4)
