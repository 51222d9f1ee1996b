"""The penalty on units that amplify, as a part of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from fewstep.diffusion import VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.gates import ResidualGates
from lightning_modules import DiffusionTraining, FewStepModule
from lightning_modules.sensitivity_penalty import SensitivityPenalty
from scripts.loggers import MetricsCSV, read_metrics

import training_runs
from training_runs import assert_same_run, data_for, method, trained, trainer_of

QUIET = training_runs.network
OPTIONS: dict[str, Any] = {"gates": ResidualGates()}
PENALTY = SensitivityPenalty(weight=0.5, every=2, units=1, gate_weight=0.1)


def loud(**options: Any) -> DiT:
    """A network whose blocks are far from the identity."""
    network: DiT = QUIET(**options)
    with torch.no_grad():
        for block in network.transformer.transformer_blocks:
            block.norm1.linear.weight.mul_(10)
    return network


@pytest.fixture(autouse=True)
def loud_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked, and have it too."""
    monkeypatch.setattr(training_runs, "network", loud)


class Logged(pl.Callback):
    """What each update logs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.seen.append({name: value.item() for name, value in metrics.items()})


def fit(
    folder: Path, updates: int, **options: Any
) -> tuple[FewStepModule, list[dict[str, float]], dict[int, float]]:
    """The trained module, what each update logged, and the penalties by the updates they are of."""
    module, logged = method("gated", **OPTIONS, **options), Logged()
    trainer = trainer_of("single", 1, updates, logged)
    trainer.loggers = [MetricsCSV(folder)]
    trainer.fit(module, data_for("gated"))
    return module, logged.seen, dict(read_metrics(folder).get("train/sensitivity", []))


def test_the_penalty_comes_every_so_many_updates_and_the_gates_excess_at_each(
    tmp_path: Path,
) -> None:
    _, logged, penalties = fit(tmp_path, 4, sensitivity=PENALTY)
    assert list(penalties) == [1, 3]
    assert penalties[1] > 1e-3
    assert penalties[1] != penalties[3]
    assert not any("train/sensitivity" in one for one in logged), "none is repeated"
    assert logged[0]["train/gate_excess"] == pytest.approx(4 * (4 * 1 - 1), rel=1e-5)
    assert len({one["train/gate_excess"] for one in logged}) == 4


@pytest.mark.slow
def test_a_weight_of_zero_changes_no_bit(tmp_path: Path) -> None:
    plain, logged, penalties = fit(tmp_path / "a", 2)
    other, *_ = fit(tmp_path / "b", 2, sensitivity=SensitivityPenalty())
    assert all(map(torch.equal, plain.student.parameters(), other.student.parameters()))
    assert not penalties
    assert not any("excess" in name for one in logged for name in one)


@pytest.mark.slow
def test_a_heavy_penalty_makes_units_even(tmp_path: Path) -> None:
    light, heavy = (SensitivityPenalty(weight, every=1, units=2) for weight in (1e-6, 100.0))
    *_, first = fit(tmp_path / "light", 10, sensitivity=light)
    *_, then = fit(tmp_path / "heavy", 10, sensitivity=heavy)
    assert then[1] == pytest.approx(first[1])
    assert then[10] < 0.5 * first[10]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_have_the_penalty_of_one_device(kind: str) -> None:
    (alone,) = trained(1, "single", "gated", **OPTIONS, sensitivity=PENALTY)
    (plain,) = trained(1, "single", "gated", **OPTIONS)
    first, second = trained(2, kind, "gated", **OPTIONS, sensitivity=PENALTY)
    assert first[2] == (kind == "fsdp")
    assert_same_run(first, alone)
    with pytest.raises(AssertionError):
        assert_same_run(plain, alone)
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())


def test_micro_batches_and_recomputation_change_nothing() -> None:
    (alone,) = trained(1, "single", "gated", **OPTIONS, sensitivity=PENALTY)
    for options in ({"accumulate": 2}, {"checkpoint_activations": True}):
        (other,) = trained(1, "single", "gated", **OPTIONS, sensitivity=PENALTY, **options)
        assert_same_run(other, alone)


def untrained(**options: Any) -> FewStepModule:
    network = partial(DiT, 8, 1, num_layers=2, num_heads=2, head_dim=8)
    return DiffusionTraining(network, VPSchedule(), "v_prediction", **options)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SensitivityPenalty(weight=-1.0), "cannot be negative"),
        (lambda: SensitivityPenalty(every=0), "at least 1, not 0 and 4"),
        (
            lambda: untrained(sensitivity=SensitivityPenalty(gate_weight=1.0)).configure_model(),
            "no gates with an alpha",
        ),
        (
            lambda: untrained(
                sensitivity=SensitivityPenalty(gate_weight=1.0), gates=ResidualGates(mode="beta")
            ).configure_model(),
            "no gates with an alpha",
        ),
        (
            lambda: untrained(
                sensitivity=SensitivityPenalty(1.0), compile_blocks=True
            ).configure_model(),
            "Set compile_blocks: false",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(FewstepError, match=complaint):
        make()


def test_networks_without_units_are_refused() -> None:
    with pytest.raises(FewstepError, match="no block of this network is known"):
        SensitivityPenalty(1.0).check(torch.nn.Linear(2, 2), compiled=False)
