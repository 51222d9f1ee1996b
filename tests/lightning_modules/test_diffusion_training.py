"""Denoising training against the loss an exact denoiser must have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewstep.contracts import Batch
from fewstep.diffusion import Backbone, Denoiser, FlowSchedule, PredictionType, VPSchedule
from fewstep.networks import RingMixture
from fewstep.seeding import torch_generator
from lightning_modules import DiffusionTraining

STD = 0.5


def gaussian_batch(count: int) -> Batch:
    network = RingMixture(VPSchedule(), num_modes=1, std=STD)
    samples, labels = network.mixture.sample(count, torch_generator(0, "data"))
    return {"sample": samples, "cond": {"class_labels": labels}, "key": [""] * count}


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance(shift: float) -> None:
    """For Gaussian data ``Var(eps | x_t) = alpha^2 c^2 / (alpha^2 c^2 + sigma^2)``; any other
    output costs its squared error on top."""
    schedule = VPSchedule()
    module = DiffusionTraining(
        lambda: RingMixture(schedule, num_modes=1, std=STD), schedule, "epsilon", cond_dropout=0.0
    )
    module.configure_model()
    torch.nn.init.constant_(module.student.backbone.outlet.bias, shift)  # type: ignore[union-attr, arg-type]
    batch = gaussian_batch(200_000)
    draws = module.draw(batch, torch_generator(0, "draws"))
    (update,) = list(module.updates(batch, draws))
    alpha, sigma = schedule.alpha(draws.t), schedule.sigma(draws.t)
    variance = (alpha * STD).square() / ((alpha * STD).square() + sigma.square())
    expected = float(variance.mean()) + shift**2
    assert float(update.loss) == pytest.approx(expected, rel=0.01)


TYPES: list[PredictionType] = ["epsilon", "v_prediction", "sample", "flow_prediction"]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_every_prediction_type_learns_its_own_target(
    prediction_type: PredictionType,
    backbone: Callable[[], Backbone],
    digit_batch: Batch,
) -> None:
    """With the target itself as output the loss is zero, and the reading gives back x0 and eps."""
    schedule = FlowSchedule() if prediction_type == "flow_prediction" else VPSchedule()
    module = DiffusionTraining(backbone, schedule, prediction_type, cond_dropout=0.0)
    module.configure_model()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    x0, noise = digit_batch["sample"], draws.noise
    alpha, sigma = schedule.levels(draws.t, x0)
    answers = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }

    def oracle(
        x_t: torch.Tensor, t: torch.Tensor, cond: object = None
    ) -> tuple[torch.Tensor, None]:
        return answers[prediction_type], None

    module.student.outputs = oracle  # type: ignore[method-assign, assignment]
    (update,) = list(module.updates(digit_batch, draws))
    assert float(update.loss) == pytest.approx(0, abs=1e-12)
    read = Denoiser.interpret(
        module.student, answers[prediction_type], alpha * x0 + sigma * noise, draws.t
    )
    torch.testing.assert_close(sigma * read.eps, sigma * noise, atol=1e-4, rtol=1e-4)


def test_class_dropout_drops_the_stated_share_and_only_then(
    backbone: Callable[[], Backbone], digit_batch: Batch
) -> None:
    for share in (0.0, 0.25, 1.0):
        module = DiffusionTraining(backbone, VPSchedule(), "epsilon", cond_dropout=share)
        batch: Batch = {**digit_batch, "sample": torch.zeros(4000, 1, 1, 1)}
        dropped = module.draw(batch, torch_generator(0, "draws")).dropped
        assert float(dropped.float().mean()) == pytest.approx(share, abs=0.03)


def test_dropped_conditions_become_the_null_class(
    backbone: Callable[[], Backbone], digit_batch: Batch
) -> None:
    module = DiffusionTraining(backbone, VPSchedule(), "epsilon", cond_dropout=1.0)
    module.configure_model()
    seen: list[torch.Tensor] = []
    module.student.backbone.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    list(module.updates(digit_batch, draws))
    assert (seen[0] == 10).all()


def test_sampling_follows_the_ode_from_the_same_noise_to_the_same_sample(
    backbone: Callable[[], Backbone],
) -> None:
    module = DiffusionTraining(backbone, VPSchedule(), "v_prediction")
    module.configure_model()
    noise = torch.randn(2, 1, 8, 8)
    cond = {"class_labels": torch.tensor([1, 2])}
    assert torch.equal(module.sample(noise, cond, 3), module.sample(noise, cond, 3))
    assert not torch.equal(module.sample(noise, cond, 3), module.sample(noise, cond, 4))
