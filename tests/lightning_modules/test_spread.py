"""How samples' spread is measured, and that what it warns of is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules import AdversarialPostTraining
from lightning_modules.adversarial_game import AdversarialGame
from lightning_modules.spread import between_seeds, moments, spreads

from post_training import built, vectors
from training_runs import Data, teacher, trainer_of


def samples_of(seeds: float, prompts: float, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Two samples of each prompt, with given deviations between seeds and between prompts."""
    made = torch.Generator().manual_seed(0)
    prompt = prompts * torch.randn(count, 1, 3, 5, generator=made)
    first, second = seeds * torch.randn(2, count, 1, 3, 5, generator=made)
    return 7.0 + prompt + first, 7.0 + prompt + second


def logged(real: Tensor, first: Tensor, second: Tensor, parts: int) -> dict[str, float]:
    """As they come out of so many micro-batches."""
    means: dict[str, Tensor] = {}
    lots = zip(real.chunk(parts), first.chunk(parts), second.chunk(parts), strict=True)
    for r, f, s in lots:
        found = moments("real", r) | moments("fake", f) | between_seeds(f, s)
        for name, value in found.items():
            means[name] = means.get(name, torch.zeros(())) + value / parts
    return {name: float(value) for name, value in spreads(means).items()}


@pytest.mark.parametrize("parts", [1, 1000])
def test_spreads_are_variances_in_units_of_the_datas_even_with_one_sample_a_device(
    parts: int,
) -> None:
    real = 3 + 2 * torch.randn(1000, 1, 3, 5, generator=torch.Generator().manual_seed(1))
    found = logged(real, *samples_of(1.0, 1.0, 1000), parts)
    assert found["spread"] == pytest.approx(0.5, abs=0.04)
    assert found["seed_spread"] == pytest.approx(0.25, abs=0.03)
    assert found["prompt_spread"] == pytest.approx(0.25, abs=0.04)
    assert len(found) == 3


def test_alarms_tell_collapse_and_a_won_game_and_nothing_else() -> None:
    limits = {alarm.value: alarm.below for alarm in built().alarms()}
    (won_gap,) = (alarm.above for alarm in built().alarms() if alarm.above is not None)
    real = torch.randn(4000, 1, 3, 5, generator=torch.Generator().manual_seed(1))

    def raised(first: Tensor, second: Tensor) -> set[str]:
        found = logged(real, first, second, 1)
        return {n for n in found if found[n] < (limits.get(f"train/{n}") or -1)}

    assert raised(*samples_of(0.5, 0.8)) == set()
    assert raised(*samples_of(0.01, 0.01)) == {"spread", "seed_spread"}
    assert raised(*samples_of(0.01, 0.9)) == {"seed_spread"}
    game = AdversarialGame(False, 0.0, 0.1, False)
    real_logits, fake_logits = torch.full((2, 4), 2.5) * torch.tensor([[1.0], [-1.0]])
    draws = vectors(4)[2]
    _, won = game.discriminator_loss(lambda *_: (real_logits, fake_logits), real, real, draws)
    _, even = game.discriminator_loss(lambda *_: (0 * real_logits,) * 2, real, real, draws)
    assert float(even["logit_gap"]) == 0 < won_gap < float(won["logit_gap"])


class Seen(Callback):
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_what_is_watched_is_logged_and_moments_are_not() -> None:
    torch.manual_seed(3)
    module, seen = AdversarialPostTraining(teacher, teacher), Seen()
    trainer_of("single", 1, 1, seen).fit(module, Data())
    assert {alarm.value for alarm in module.alarms()} <= set(seen.logged)
    assert {"train/logit_gap", "train/penalty", "train/prompt_spread"} <= set(seen.logged)
    assert not any("moment" in name for name in seen.logged)
