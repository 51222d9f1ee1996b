"""APT against closed forms, exact penalties and its own algorithm written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.contracts import Batch
from fewstep.diffusion import Backbone, Denoiser, FlowSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.loading import load_denoiser
from fewstep.networks.lora import LoRA
from fewstep.networks.text import TextEncoding
from fewstep.seeding import torch_generator
from lightning_modules import (
    AdversarialPostTraining,
    ConsistencyDistillation,
    DiffusionTraining,
    Pretrained,
)
from lightning_modules.adversarial_game import AdversarialDraws, AdversarialGame
from lightning_modules.adversarial_post_training import rms_prop
from lightning_modules.preparation import checkpoint_activations
from lightning_modules.roles import load_teacher, run_seed
from lightning_modules.spread import between_seeds, moments, spreads

from tiny_students import save_student
from tiny_transformers import SAVES
from training_runs import Data, Stream, teacher, trained, trainer_of

SGD = partial(torch.optim.SGD, lr=0.1)
SEEDS = 6


def built(**options: Any) -> AdversarialPostTraining:
    """A method with its roles, of the same first weights each time."""
    torch.manual_seed(3)
    module = AdversarialPostTraining(**{"start": teacher, "teacher": teacher, **options})
    module.configure_model()
    return module.train()  # type: ignore[return-value]


def digits(size: int = 6) -> Batch:
    draws = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(size, 1, 8, 8, generator=draws),
        "cond": {"class_labels": torch.arange(size) % 10},
        "key": [str(number) for number in range(size)],
    }


def draw(module: AdversarialPostTraining, batch: Batch, seed: int = 1) -> AdversarialDraws:
    return module.draw(batch, torch_generator(seed, "test"))


# ---------------------------------------------------------------------- the penalty


class Critic(nn.Module):
    """A small discriminator of vectors, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(16, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1)]
        self.layers = nn.Sequential(*layers).double()

    def judge(self, samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.layers(x)[:, 0] for x in samples)

    def slopes(self) -> list[nn.Parameter]:
        """All but the last bias, on which no penalty depends."""
        return list(self.layers.parameters())[:-1]


def vectors(size: int, repeats: int = 1) -> tuple[Tensor, Tensor, AdversarialDraws]:
    """Real and generated vectors, each so many times, with perturbations that all differ."""
    made = torch.Generator().manual_seed(1)
    kind: dict[str, Any] = {"generator": made, "dtype": torch.float64}
    real, fake = torch.randn(2, size, 16, **kind).repeat(1, repeats, 1)
    noises = torch.randn(4, size * repeats, 16, **kind)
    return real, fake, AdversarialDraws(*noises, *torch.zeros(3, size * repeats))


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("sigma", [0.1, 0.01, 1e-3])
@pytest.mark.parametrize("relativistic", [False, True])
def test_the_approximated_penalties_are_on_average_the_squared_gradients(
    relativistic: bool, sigma: float
) -> None:
    critic = Critic()
    _, exact = AdversarialGame(relativistic, 1.0, sigma, True).discriminator_loss(
        critic.judge, *vectors(64)
    )
    _, found = AdversarialGame(relativistic, 1.0, sigma, False).discriminator_loss(
        critic.judge, *vectors(64, 400)
    )
    names = ["penalty", "fake_penalty"] if relativistic else ["penalty"]
    assert [name for name in found if "penalty" in name] == names
    for name in names:
        assert float(found[name].detach()) == pytest.approx(float(exact[name].detach()), rel=0.03)


def cosine_with_exact(judge_of: Callable[[Critic], Any]) -> float:
    critic = Critic()
    _, exact = AdversarialGame(False, 1.0, 0.01, True).discriminator_loss(
        critic.judge, *vectors(64)
    )
    wanted = gradient(exact["penalty"], critic.slopes())
    _, logs = AdversarialGame(False, 1.0, 0.01, False).discriminator_loss(
        judge_of(critic), *vectors(64, 64)
    )
    found = gradient(logs["penalty"], critic.slopes())
    return float(torch.cosine_similarity(found, wanted, dim=0))


def test_the_approximated_penalty_trains_as_the_exact_one() -> None:
    assert cosine_with_exact(lambda critic: critic.judge) > 0.99


def test_a_penalty_with_one_branch_detached_would_train_something_else() -> None:
    """So the test above sees whether both branches carry gradient."""

    def half(critic: Critic) -> Any:
        def judge(samples: Sequence[Tensor], positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
            *logits, perturbed = critic.judge(samples, positions)
            return (*logits, perturbed.detach())

        return judge

    assert abs(cosine_with_exact(half)) < 0.5


def test_the_penalty_weighs_as_published() -> None:
    """``lambda |D(x) - D(x + sigma n)|^2``; exactly ``lambda sigma^2 |grad D|^2``."""
    critic, given = Critic(), vectors(8)
    real, _, draws = given
    clean, moved = critic.judge([real, real + 0.1 * draws.real_perturbation], [])
    for exact in (False, True):
        loss, logs = AdversarialGame(False, 50.0, 0.1, exact).discriminator_loss(
            critic.judge, *given
        )
        penalty = loss - logs["discriminator"]
        wanted = 50 * (clean - moved).square().mean() if not exact else 0.5 * logs["penalty"]
        torch.testing.assert_close(penalty, wanted)


def dirac_radius(strength: float) -> float:
    """Distance from equilibrium after 2,000 steps from (1, 1): ``D = psi x``, real samples at 0."""
    psi, theta = torch.ones((), dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    psi.requires_grad_(True)
    theta.requires_grad_(True)
    game = AdversarialGame(False, strength, 1.0, strength > 0)
    real, none = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1)
    draws = AdversarialDraws(*[real] * 4, *[none] * 3)

    def judge(samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple((psi * x)[:, 0] for x in samples)

    for _ in range(2000):
        loss, _ = game.discriminator_loss(judge, real, theta.detach(), draws)
        psi.data -= 0.1 * torch.autograd.grad(loss, psi)[0]
        loss = game.student_loss(judge, real, theta, none)
        theta.data -= 0.1 * torch.autograd.grad(loss, theta)[0]
    return float(torch.stack([psi, theta[0, 0]]).norm().detach())


def test_the_dirac_gan_closes_in_as_fast_as_the_penalty_says() -> None:
    assert dirac_radius(0.0) == pytest.approx(0.20, abs=0.005)
    assert dirac_radius(0.01) == pytest.approx(0.053, abs=0.001)


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


class Flow(Backbone):
    """``v = a z + b``, and what times it was asked at."""

    def __init__(self, slope: float, offset: float) -> None:
        super().__init__()
        self.config = {}
        self.sample_shape = (1, 8, 8)
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), offset
        self.block = nn.Conv2d(1, 4, 1)
        self.times: list[float] = []

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {"block": 4}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        self.times += t.unique().tolist()
        self.block(x_t)
        return self.slope * x_t + self.offset


def flow(slope: float = 0.75, offset: float = -0.5) -> Denoiser:
    return Denoiser(Flow(slope, offset), FlowSchedule(shift=3.0), "flow_prediction")


def flow_module(**options: Any) -> AdversarialPostTraining:
    module = AdversarialPostTraining(**{"start": flow, "teacher": flow, **options})
    module.configure_model()
    return module


@pytest.mark.parametrize(
    ("shift", "mean", "median", "below"), [(1.0, 0.5, 0.5, 0.5), (12.0, 0.8445, 0.923, 0.077)]
)
def test_times_told_to_the_discriminator_follow_the_published_law(
    shift: float, mean: float, median: float, below: float
) -> None:
    module = flow_module(time_shift=shift)
    times = module.times(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert float(times.mean()) / 1000 == pytest.approx(mean, abs=0.004)
    assert float(times.median()) / 1000 == pytest.approx(median, abs=0.004)
    assert float((times < 500).float().mean()) == pytest.approx(below, abs=0.004)
    ends = module.times(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.0, 1000.0])


def test_times_of_a_discrete_model_are_its_own_and_reach_both_ends() -> None:
    times = built().times(torch.linspace(0, 1, 5001)[:-1])
    assert torch.equal(times, times.round())
    assert (times.min(), times.max()) == (0, 999)


def test_the_student_jumps_from_pure_noise_in_one_evaluation() -> None:
    module, batch = flow_module(), digits()
    network: Any = module.student.backbone
    draws = draw(module, batch)
    made = module.generate(draws.noise, batch["cond"])
    torch.testing.assert_close(made, draws.noise - (0.75 * draws.noise - 0.5))
    list(module.updates(batch, draws))
    assert network.times == [1000.0] * 3
    sampled = module.sample(draws.noise, batch["cond"], 1, role="student")
    torch.testing.assert_close(sampled, made)


def test_two_steps_renoise_or_go_on_along_the_line() -> None:
    batch = digits()
    z = draw(flow_module(), batch).noise
    t, v = 0.75, 0.75 * z - 0.5  # the middle of two steps at a shift of 3
    on_line = z - (1 - t) * v
    module = flow_module(two_steps="line")
    found = module.sample(z, batch["cond"], 2, role="student")
    torch.testing.assert_close(found, on_line - t * (0.75 * on_line - 0.5))
    module = flow_module(two_steps="renoise")
    found = module.sample(z, batch["cond"], 2, torch_generator(0, "x"), role="student")
    fresh = torch.randn(z.shape, generator=torch_generator(0, "x"))
    renoised = (1 - t) * (z - v) + t * fresh
    torch.testing.assert_close(found, renoised - t * (0.75 * renoised - 0.5))


# ---------------------------------------------------------------------- the two stages


def test_each_network_starts_from_the_weights_of_the_stage_before(tmp_path: Path) -> None:
    diffusion, first = tmp_path / "diffusion.ckpt", tmp_path / "first.ckpt"
    save_student(DiffusionTraining(start=teacher, ema_decay=0.9), diffusion)
    stage = ConsistencyDistillation(
        str(diffusion), 20, guidance_range=(7.5, 7.5), loss="l2", ema_decay=0.9
    )
    save_student(stage, first)
    module = AdversarialPostTraining(str(first), str(diffusion))
    module.configure_model()
    wanted = load_denoiser(first, "ema").denoiser.state_dict()
    other = load_denoiser(first, "student").denoiser.state_dict()
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, wanted[name])
    assert any(not torch.equal(wanted[name], value) for name, value in other.items())
    backbone = module.discriminator.backbone
    source = load_denoiser(diffusion).denoiser.backbone.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in backbone.state_dict().items())
    assert any(not torch.equal(wanted[f"backbone.{n}"], v) for n, v in source.items())
    both = [*module.student.parameters(), *module.discriminator.parameters()]
    assert all(parameter.requires_grad for parameter in both)
    assert module.ema is not None
    kept = [p.data_ptr() for p in module.parameters()]
    assert len(kept) == len(set(kept))
    assert set(module.provenance) == {"start", "teacher"}


def test_a_guidance_range_of_one_value_is_constant_guidance() -> None:
    module = ConsistencyDistillation(teacher, 20, guidance_range=(7.5, 7.5), loss="l2")
    module.configure_model()
    draws = module.draw(digits(), torch_generator(0, "x"))
    assert draws.guidance.tolist() == [7.5] * 6
    assert module.guidance_scale("teacher") == 7.5


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_negative_prompt_takes_the_empty_ones_place(tmp_path: Path, name: str) -> None:
    """Also where the pipeline itself gives zeros."""
    folder = SAVES[name](tmp_path)
    backbone, texts = {}, {}
    for prompt in (None, "blur"):
        found, origin = load_teacher(Pretrained(str(folder), (16, 16), negative_prompt=prompt))
        backbone[prompt] = found.backbone
        texts[prompt] = origin.get("negative_prompt")
    assert texts == {None: None, "blur": "blur"}
    given = TextEncoding(folder).encode(["a", "b"])
    null = {key: network.null_cond(given) for key, network in backbone.items()}
    wanted = TextEncoding(folder).encode(["blur", "blur"])
    assert set(null["blur"]) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(null["blur"][key], value)
        assert not torch.allclose(null[None][key], value)


def test_two_sources_of_the_unconditional_branch_are_refused() -> None:
    with pytest.raises(FewstepError, match="leave one of them out"):
        Pretrained("models/sd15", empty="empty.safetensors", negative_prompt="blur")


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


# ---------------------------------------------------------------------- signs of collapse


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
    real = torch.randn(4000, 1, 3, 5, generator=torch.Generator().manual_seed(1))

    def raised(first: Tensor, second: Tensor) -> set[str]:
        found = logged(real, first, second, 1)
        return {n for n in found if found[n] < (limits.get(f"train/{n}") or -1)}

    assert raised(*samples_of(0.5, 0.8)) == set()
    assert raised(*samples_of(0.01, 0.01)) == {"spread", "seed_spread"}
    assert raised(*samples_of(0.01, 0.9)) == {"seed_spread"}
    game = AdversarialGame(False, 0.0, 0.1, False)
    real_logits, fake_logits = torch.full((2, 4), 6.0) * torch.tensor([[1.0], [-1.0]])
    draws = vectors(4)[2]
    won, _ = game.discriminator_loss(lambda *_: (real_logits, fake_logits), real, real, draws)
    even, _ = game.discriminator_loss(lambda *_: (0 * real_logits,) * 2, real, real, draws)
    assert float(won) < (limits["train/discriminator"] or 0) < float(even)


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


def test_validation_gives_the_same_losses_without_a_graph() -> None:
    module, batch = built(exact_penalty=True), digits()
    with torch.no_grad():
        theirs, ours = module.updates(batch, draw(module, batch))
    assert float(theirs.logs["discriminator"]) == pytest.approx(1.386, abs=0.3)
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
    other = AdversarialPostTraining(teacher, lambda: Denoiser(DiT(4, 1), FlowSchedule(), "epsilon"))
    with pytest.raises(FewstepError, match="give the diffusion model that `start` came from"):
        other.configure_model()


# ---------------------------------------------------------------------- why there is a penalty


class Perceptron(nn.Sequential):
    def __init__(self, inputs: int, width: int, outputs: int, depth: int) -> None:
        hidden = [nn.Linear(inputs, width), nn.SiLU()]
        for _ in range(depth - 1):
            hidden += [nn.Linear(width, width), nn.SiLU()]
        super().__init__(*hidden, nn.Linear(width, outputs))


def ring(count: int, std: float, generator: torch.Generator) -> Tensor:
    """Eight modes at a radius of two."""
    angle = torch.randint(8, (count,), generator=generator) * (torch.pi / 4)
    at = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return at + std * torch.randn(count, 2, generator=generator)


def plain_judge(network: nn.Module) -> Any:
    def judge(samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        logits = network(torch.cat(list(samples)))[:, 0]
        return tuple(logits.chunk(len(samples)))

    return judge


def noises(like: Tensor, generator: torch.Generator) -> AdversarialDraws:
    drawn = [torch.randn(like.shape, generator=generator) for _ in range(4)]
    return AdversarialDraws(*drawn, *torch.zeros(3, len(like)))


def saturated_loss(penalty: float, sigma: float) -> float:
    """The discriminator's last losses against a generator that stands still, in 32 dimensions."""
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(32, 2, generator=made)).Q.T
    critic, game = Perceptron(32, 96, 1, 3), AdversarialGame(False, penalty, sigma, False)
    optimizer = torch.optim.RMSprop(critic.parameters(), 1e-3, 0.9)
    losses = []
    for _ in range(1200):
        real, fake = ring(128, 0.1, made) @ plane, ring(128, 0.1, made) @ plane
        fake = fake + 0.3 * torch.randn(128, 32, generator=made)
        loss, logs = game.discriminator_loss(plain_judge(critic), real, fake, noises(real, made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(logs["discriminator"].detach()))
    return sum(losses[-100:]) / 100


@pytest.mark.slow
def test_the_penalty_keeps_the_discriminator_from_winning() -> None:
    """The mechanism of the paper's figure 5, and that it grows with the weight."""
    losses = [saturated_loss(penalty, 0.1) for penalty in (0.0, 1.0, 10.0, 100.0)]
    assert losses == sorted(losses)
    assert losses[-1] > 5 * losses[0]


class Crowd(nn.Module):
    """Perceptrons for several seeds at once, ``(S, B, inputs)`` to ``(S, B, outputs)``."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        widths = [inputs, *[64] * depth, outputs]
        made = [[nn.Linear(*pair) for _ in range(SEEDS)] for pair in pairwise(widths)]
        self.weights, self.biases = (
            nn.ParameterList(
                torch.stack([getattr(one, name).detach() for one in layer]) for layer in made
            )
            for name in ("weight", "bias")
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias[:, None], nn.functional.silu(x) if number else x, weight.mT)
        return x


def modes_found(loss: str, penalty: float) -> list[int]:
    """Of eight, by small generators with five steps of the discriminator a step of their own."""
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(0)
    student, critic = Crowd(2, 2, 2), Crowd(2, 1, 3)
    game = AdversarialGame(loss == "relativistic", penalty, 0.1, False)
    adam = partial(torch.optim.Adam, lr=5e-4, betas=(0.5, 0.999))
    ours, theirs = adam(student.parameters()), adam(critic.parameters())

    def judge(samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        lots = critic(torch.cat(list(samples), dim=1)).chunk(len(samples), dim=1)
        return tuple(lot.flatten() for lot in lots)

    for update in range(9000):
        real = ring(SEEDS * 128, 0.02, made).unflatten(0, (SEEDS, 128))
        fake = student(torch.randn(SEEDS, 128, 2, generator=made))
        if update % 6 < 5:
            draws = noises(real, made)
            value, _ = game.discriminator_loss(judge, real, fake.detach(), draws)
        else:
            value = game.student_loss(judge, real, fake, draws.student_position)
        optimizer = theirs if update % 6 < 5 else ours
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        found = student(torch.randn(SEEDS, 2000, 2, generator=made))
    angle = torch.arange(8) * (torch.pi / 4)
    distance = torch.cdist(found, 2 * torch.stack([angle.cos(), angle.sin()], dim=1))
    modes: list[int] = ((distance < 0.25).sum(1) >= 20).sum(1).tolist()
    return modes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "penalty", "low", "high"),
    [
        ("non_saturating", 0.0, 0.0, 4.0),
        ("non_saturating", 1.0, 5.5, 8.0),
        ("relativistic", 10.0, 7.5, 8.0),
    ],
)
def test_penalties_keep_modes_that_a_plain_gan_loses(
    loss: str, penalty: float, low: float, high: float
) -> None:
    """On average over seeds; pairs and penalties on both sides keep nearly all of them."""
    modes = modes_found(loss, penalty)
    assert low <= sum(modes) / SEEDS <= high, modes
