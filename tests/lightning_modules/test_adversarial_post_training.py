"""APT against its own algorithm written out by hand: who is judged, trained and asked, and when."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion import Denoiser, FlowSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.lora import LoRA
from fewstep.seeding import torch_generator
from lightning_modules import AdversarialPostTraining
from lightning_modules.adversarial_post_training import rms_prop
from lightning_modules.preparation import checkpoint_activations
from lightning_modules.roles import run_seed

from post_training import built, digits, draw
from training_runs import Data, Stream, teacher, trained, trainer_of

SGD = partial(torch.optim.SGD, lr=0.1)

# ---------------------------------------------------------------------- what is judged, and when


def recorded(module: AdversarialPostTraining) -> list[tuple[Tensor, Tensor]]:
    calls: list[tuple[Tensor, Tensor]] = []
    module.discriminator.register_forward_pre_hook(lambda _module, given: calls.append(given[:2]))
    return calls


def test_the_discriminator_sees_clean_samples_once_a_turn_and_a_pair_at_the_same_time() -> None:
    module, batch = built(sigma=0.1), digits()
    calls, draws = recorded(module), draw(module, batch)
    list(module.updates(batch, draws))
    (samples, times), (fakes, _) = calls
    real, fake, moved = samples.chunk(3)
    assert torch.equal(real, batch["sample"])
    assert torch.equal(moved, real + 0.1 * draws.real_perturbation)
    assert torch.equal(fake, module.generate(draws.noise, batch["cond"]))
    assert torch.equal(fakes, module.generate(draws.student_noise, batch["cond"]))
    at_real, at_fake, at_moved = times.chunk(3)
    assert torch.equal(at_real, at_moved)
    assert not torch.equal(at_real, at_fake)
    assert len(at_real.unique()) > 1


def test_relativistic_pairs_are_judged_at_the_same_time_and_both_are_perturbed() -> None:
    module, batch = built(sigma=0.1, loss="relativistic"), digits()
    calls, draws = recorded(module), draw(module, batch)
    list(module.updates(batch, draws))
    (samples, times), (real, real_times), (_, fake_times) = calls
    assert all(torch.equal(times[:6], part) for part in times.chunk(4))
    assert torch.equal(real_times, fake_times)
    _, fake, _, moved = samples.chunk(4)
    torch.testing.assert_close(moved, fake + 0.1 * draws.fake_perturbation)
    assert torch.equal(real, batch["sample"])


def test_one_call_for_all_lots_is_as_good_as_one_for_each() -> None:
    module, batch = built(sigma=0.1), digits()
    draws = draw(module, batch)
    samples = [batch["sample"], draws.noise]
    positions = [draws.real_position, draws.fake_position]
    together = module.judge(batch["cond"], samples, positions)
    for found, x, position in zip(together, samples, positions, strict=True):
        (alone,) = module.judge(batch["cond"], [x], [position])
        torch.testing.assert_close(found, alone)


# ---------------------------------------------------------------------- the step


def test_a_turns_gradient_reaches_its_own_role_and_passes_through_the_other() -> None:
    module, batch = built(), digits()
    theirs, ours = module.updates(batch, draw(module, batch))
    assert (theirs.role, ours.role) == ("discriminator", "student")
    student, discriminator = (
        dict(role.named_parameters()) for role in (module.student, module.discriminator)
    )
    none = torch.autograd.grad(
        theirs.loss, list(student.values()), retain_graph=True, allow_unused=True
    )
    assert all(gradient is None for gradient in none)
    torch.autograd.grad(theirs.loss, list(discriminator.values()))  # none of them is unused
    found = dict(zip(student, torch.autograd.grad(ours.loss, list(student.values())), strict=True))
    # A key's bias changes no softmax.
    assert all(found[name].any() for name in found if not name.endswith("to_k.bias"))


def by_hand(updates: int, **options: Any) -> AdversarialPostTraining:
    """The algorithm written out: the discriminator's step, then the student's against it."""
    module = built(ema_decay=0.9, **options)
    roles = {"discriminator": module.discriminator, "student": module.student}
    optimizers = {role: SGD(network.parameters()) for role, network in roles.items()}
    assert module.ema is not None
    average = dict(module.ema.named_parameters())
    for update, batch in zip(range(updates), Stream(Data(), 0, 1, 0), strict=False):
        draws = module.draw(batch, torch_generator(run_seed(), "train", update, 0))
        made: list[Tensor] = []
        for turn in (module.discriminator_turn, module.student_turn):
            (step,) = turn(made, batch, draws)
            own = list(roles[step.role].parameters())
            for parameter, slope in zip(own, torch.autograd.grad(step.loss, own), strict=True):
                parameter.grad = slope
            optimizers[step.role].step()
        for name, parameter in module.student.named_parameters():
            average[name].data.lerp_(parameter.detach(), 0.1)
    return module


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_alternates_as_written_out_however_a_batch_is_split(
    accumulate: int, loss: str
) -> None:
    chosen: dict[str, Any] = {"loss": loss, "sigma": 0.1, "penalty": 10.0}
    wanted = by_hand(3, **chosen)
    torch.manual_seed(3)
    module = AdversarialPostTraining(
        teacher,
        teacher,
        optimizer=SGD,
        discriminator_optimizer=SGD,
        ema_decay=0.9,
        accumulate=accumulate,
        **chosen,
    )
    trainer = trainer_of("single", 1, 3)
    trainer.fit(module, Data())
    assert trainer.global_step == 3
    found = dict(module.named_parameters())
    for name, value in wanted.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6)
    before = teacher().backbone.state_dict()
    moved = wanted.discriminator.backbone.state_dict()
    assert sum(not torch.equal(moved[n], v) for n, v in before.items()) > len(before) / 2


def test_the_published_step_runs_on_flash_attention_with_recomputed_blocks() -> None:
    """So nothing in it is differentiated twice; the exact penalty is the same with and without."""
    plain, batch = built(), digits()
    checkpointed = built()
    for role in (checkpointed.student, checkpointed.discriminator):
        checkpoint_activations(role)
    slopes = []
    for module in (plain, checkpointed):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for step in module.updates(batch, draw(module, batch)):
                step.loss.backward(inputs=list(getattr(module, step.role).parameters()))
        slopes.append([p.grad for p in module.parameters() if p.grad is not None])
    for found, wanted in zip(*slopes, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_exact_penalty_trains_too() -> None:
    module, batch = built(exact_penalty=True, penalty=10.0, sigma=0.1), digits()
    first, _ = module.updates(batch, draw(module, batch))
    assert float(first.logs["penalty"].detach()) > 0
    parameters = [p for n, p in module.discriminator.named_parameters() if "logit" not in n]
    penalised = torch.autograd.grad(first.logs["penalty"], parameters, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in penalised) > len(penalised) / 2


def test_rms_prop_steps_as_adam_without_first_moment_and_bias_correction() -> None:
    ours, theirs = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizers = [rms_prop([ours], lr=1.0), torch.optim.Adam([theirs], 1.0, (0.0, 0.9))]
    for count in range(1, 6):
        before = [ours.detach().clone(), theirs.detach().clone()]
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5]) * count
            optimizer.step()
        ratio = (ours.detach() - before[0]) / (theirs.detach() - before[1])
        assert ratio.tolist() == pytest.approx([(1 - 0.9**count) ** -0.5] * 3, rel=1e-4)
    assert "momentum_buffer" not in optimizers[0].state[ours]


def test_defaults_are_the_published_ones_for_images() -> None:
    module = built()
    made = module.make_optimizer["student"](list(module.student.parameters()))
    group = made.param_groups[0]
    assert isinstance(made, torch.optim.RMSprop)
    assert (group["lr"], group["alpha"], group["weight_decay"]) == (5e-6, 0.9, 0)
    assert (module.gradient_clip, module.ema_decay, module.ema_warmup) == (None, 0.995, False)
    assert (module.game.penalty, module.game.sigma, module.time_shift) == (100, 0.01, 1)


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
@pytest.mark.parametrize("penalty", [0.0, 100.0])
def test_evaluations_are_what_a_step_really_makes(loss: str, penalty: float) -> None:
    module, batch = built(loss=loss, penalty=penalty), digits()
    rows: dict[str, int] = {"student": 0, "discriminator": 0}

    def count(role: str, _module: nn.Module, given: Any) -> None:
        rows[role] += len(given[0])

    for role in rows:
        backbone = getattr(module, role).backbone
        backbone.register_forward_pre_hook(partial(count, role))
    list(module.updates(batch, draw(module, batch)))
    said = module.evaluations()
    assert rows == {role: said[role].forward * len(batch["sample"]) for role in rows}


def test_sharded_training_in_bfloat16_is_that_of_one_device() -> None:
    """With what is outside of the discriminator's blocks in float32 in both."""
    ((_, alone, _),) = trained(1, "single", "apt", precision="bf16-mixed")
    (weights, losses, sharded), _ = trained(2, "fsdp", "apt", precision="bf16-mixed")
    assert sharded
    assert all(value.isfinite().all() for value in weights.values())
    for name in ("discriminator", "adversarial", "penalty"):
        found, wanted = ([step[f"train/{name}"] for step in run] for run in (losses, alone))
        assert found == pytest.approx(wanted, rel=0.05)


class Waits(TorchDispatchMode):
    """Names of the operations for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_a_step_never_waits_for_the_device(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = {"optimizer": SGD, "discriminator_optimizer": SGD}
    module = AdversarialPostTraining(teacher, teacher, loss=loss, accumulate=2, **optimizers)
    step, waits = module.training_step, Waits()

    def watched(*given: Any) -> None:
        with waits:
            step(*given)
            assert not waits.seen
            torch.ones(()).item()

    monkeypatch.setattr(module, "training_step", watched)
    trainer_of("single", 1, 1).fit(module, Data())
    assert waits.seen == ["aten._local_scalar_dense.default"]  # the one that shows it is seen


def test_validation_gives_the_same_losses_without_a_graph() -> None:
    module, batch = built(exact_penalty=True), digits()
    with torch.no_grad():
        theirs, ours = module.updates(batch, draw(module, batch))
    with_graph = next(module.updates(batch, draw(module, batch)))
    expected = float(with_graph.logs["discriminator"].detach())
    assert float(theirs.logs["discriminator"]) == pytest.approx(expected, rel=1e-4)
    assert set(ours.logs) == {"adversarial"}


def test_a_kept_teacher_samples_and_is_neither_trained_nor_saved() -> None:
    module = built(keep_teacher=True)
    assert module.sampling_roles() == ["ema", "student", "teacher"]
    assert not any(name.startswith("teacher.") for name in module.state_dict())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    own = {p.data_ptr() for p in module.discriminator.parameters()}
    assert not own & {p.data_ptr() for p in module.teacher.parameters()}
    assert built().sampling_roles() == ["ema", "student"]


# ---------------------------------------------------------------------- refusals


def test_what_cannot_work_is_refused_with_what_to_do() -> None:
    with pytest.raises(FewstepError, match="leave `lora` out"):
        AdversarialPostTraining(teacher, teacher, lora=LoRA(rank=4))
    with pytest.raises(FewstepError, match="compile_blocks: false"):
        AdversarialPostTraining(teacher, teacher, exact_penalty=True, compile_blocks=True)
    with pytest.raises(FewstepError, match="must be positive"):
        AdversarialPostTraining(teacher, teacher, sigma=0.0)
    other = AdversarialPostTraining(teacher, lambda: Denoiser(DiT(8, 3), FlowSchedule(), "epsilon"))
    with pytest.raises(FewstepError, match="`start` does not fit `teacher`"):
        other.configure_model()
