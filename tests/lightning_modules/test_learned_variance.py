"""Variances learned beside the prediction, DDPM's sampler, and clipping from an update on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning import pytorch as pl
from torch import Tensor, nn

from fewstep.contracts import Batch
from fewstep.diffusion import (
    FlowSchedule,
    Guided,
    VPSchedule,
    ancestral_sample,
    ancestral_times,
    network_target,
    variational_bound,
)
from fewstep.errors import FewstepError
from fewstep.networks import DiT, Latte
from fewstep.seeding import torch_generator
from lightning_modules import DiffusionTraining, Steering
from lightning_modules.checks import check_same_experiment

LINEAR = VPSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
OPTIONS: dict[str, int] = {"patch_size": 2, "num_layers": 2, "num_heads": 2, "head_dim": 8}


def dit() -> DiT:
    torch.manual_seed(0)
    network = DiT(8, 1, **OPTIONS, learned_variance=True)
    stir(network)
    return network


def latte() -> Latte:
    torch.manual_seed(0)
    network = Latte(8, 3, 2, **OPTIONS, learned_variance=True)
    stir(network)
    return network


@torch.no_grad()
def stir(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))


def built(**options: object) -> DiffusionTraining:
    module = DiffusionTraining(dit, LINEAR, "epsilon", cond_dropout=0.0, **options)  # type: ignore[arg-type]
    module.configure_model()
    return module


def test_the_loss_is_the_error_and_the_bound(digit_batch: Batch) -> None:
    module = built()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    (update,) = list(module.updates(digit_batch, draws))
    x0, t = digit_batch["sample"], draws.t
    x_t = LINEAR.add_noise(x0, draws.noise, t)
    output = module.student.backbone(x_t, t, **digit_batch["cond"])
    assert output.shape == (12, 2, 8, 8)
    eps, where = output.chunk(2, dim=1)
    target = network_target(x0, draws.noise, *LINEAR.levels(t, x0), "epsilon")
    predicted = module.student.interpret(eps, x_t, t).x0
    bound = variational_bound(LINEAR, x0, x_t, t, predicted, where).mean()
    torch.testing.assert_close(update.loss, (eps - target).square().mean() + bound)
    torch.testing.assert_close(update.logs["bound"], bound)


def test_the_bound_teaches_variances_alone(digit_batch: Batch) -> None:
    """The prediction's rows of the last layer have the gradient of the error, to the bit."""
    rows: dict[str, Tensor] = {}
    for name in ("both", "error"):
        module = built()
        draws = module.draw(digit_batch, torch_generator(0, "draws"))
        (update,) = list(module.updates(digit_batch, draws))
        loss = update.loss if name == "both" else update.logs["loss"]
        last = module.student.backbone.transformer.proj_out_2.weight  # type: ignore[union-attr]
        (gradient,) = torch.autograd.grad(loss, last)
        # A patch's values come channel by channel within each of its places.
        rows[name] = gradient.unflatten(0, (4, 2))
    assert torch.equal(rows["both"][:, 0], rows["error"][:, 0])
    assert torch.equal(rows["error"][:, 1], torch.zeros_like(rows["error"][:, 1]))
    assert rows["both"][:, 1].abs().sum() > 0


def coloured() -> DiT:
    torch.manual_seed(0)
    network = DiT(8, 3, **OPTIONS, learned_variance=True)
    stir(network)
    return network


def test_samples_are_drawn_with_the_variances_and_the_guidance_that_were_asked_for() -> None:
    options = {"sampling_guidance": 3.0, "guided_channels": 2, "step_counts": [5]}
    module = DiffusionTraining(coloured, LINEAR, "epsilon", sampler="ddpm", **options)  # type: ignore[arg-type]
    module.configure_model()
    noise = torch.randn(2, 3, 8, 8)
    cond = {"class_labels": torch.tensor([1, 2])}

    def own() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(2)]

    assert module.ema is not None
    found = module.sample(noise, cond, 5, own())
    times = ancestral_times(LINEAR, 5)
    for channels, same in ((2, True), (None, False)):
        guided = Guided(module.ema, 3.0, channels=channels)
        drawn = ancestral_sample(guided, noise, cond, times, own())
        assert torch.allclose(found, drawn, atol=1e-5) == same
    alone = module.sample(noise[1:], {"class_labels": torch.tensor([2])}, 5, own()[1:])
    torch.testing.assert_close(found[1:], alone, atol=1e-5, rtol=1e-4)


def test_a_run_says_how_it_samples_where_that_is_not_the_default() -> None:
    drawn = built(sampler="ddpm", guided_channels=1)
    assert drawn.metadata()["sampling"] == {"sampler": "ddpm", "guided_channels": 1}
    assert "sampling" not in built().metadata()


def test_what_could_not_work_is_refused() -> None:
    with pytest.raises(FewstepError, match="a sample's 1 channels are guided, not 3"):
        built(guided_channels=3)
    with pytest.raises(FewstepError, match="guidance alone makes the difference"):
        built(sampler="ddpm").steer(Steering())
    with pytest.raises(FewstepError, match="nothing is clipped"):
        built(gradient_clip=None, clip_from=10)


def test_a_checkpoint_from_before_there_were_variances_is_still_of_its_experiment() -> None:
    module = DiffusionTraining(partial(DiT, 8, 1, **OPTIONS), LINEAR, "epsilon")
    module.configure_model()
    stored = copy.deepcopy(module.metadata())
    del stored["denoiser"]["backbone"]["init_args"]["learned_variance"]
    check_same_experiment(stored, module.metadata())
    with pytest.raises(FewstepError, match="learned_variance: False in the checkpoint, True"):
        check_same_experiment(stored, built().metadata())


def test_clips_have_variances_too() -> None:
    network = latte()
    module = DiffusionTraining(lambda: network, LINEAR, "epsilon", sampler="ddpm")
    module.configure_model()
    noise = torch.randn(2, 2, 3, 8, 8)
    assert network(noise, torch.tensor([3.0, 900.0])).shape == (2, 4, 3, 8, 8)
    assert module.sample(noise, None, 2).shape == noise.shape


def test_a_flow_has_neither_ddpm_nor_a_bound() -> None:
    flow = FlowSchedule()
    module = DiffusionTraining(partial(DiT, 8, 1), flow, "flow_prediction", sampler="ddpm")
    with pytest.raises(FewstepError, match="sampler: ode"):
        module.configure_model()
    module = DiffusionTraining(dit, flow, "flow_prediction")
    with pytest.raises(FewstepError, match="learned_variance"):
        module.configure_model()


class Moves(pl.Callback):
    """How far the student moves at each update."""

    def __init__(self) -> None:
        self.moved: list[float] = []
        self.before: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: DiffusionTraining, *_: object
    ) -> None:  # type: ignore[override]
        now = nn.utils.parameters_to_vector(module.student.parameters()).detach().clone()
        if self.before is not None:
            self.moved.append(float((now - self.before).norm()))
        self.before = now


def test_gradients_are_clipped_from_the_update_on_that_was_asked_for(
    fit: Callable[..., pl.Trainer],
) -> None:
    moves = Moves()
    options = {"gradient_clip": 1e-3, "clip_from": 3, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    module = DiffusionTraining(dit, LINEAR, "epsilon", **options)  # type: ignore[arg-type]
    fit(module, 5, callbacks=[moves])
    second, third, fourth, fifth = moves.moved
    assert min(second, third) > 1e-3
    assert (fourth, fifth) == pytest.approx((1e-4, 1e-4), rel=0.05)
