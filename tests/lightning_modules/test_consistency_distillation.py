"""LCM: its special forms, and what it has in common with PCM."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule, ode_sample
from fewstep.diffusion.losses import pseudo_huber
from fewstep.errors import FewstepError
from fewstep.networks import RingMixture
from fewstep.seeding import torch_generator
from lightning_modules import ConsistencyDistillation, PhasedConsistencyDistillation

Make = Callable[[], Denoiser]


def ring_batch(count: int = 256) -> Batch:
    network = RingMixture(VPSchedule(), num_modes=5)
    samples, labels = network.mixture.sample(count, torch_generator(0, "data"))
    return {"sample": samples.float(), "cond": {"class_labels": labels}, "key": [""] * count}


def test_one_phase_equals_consistency_distillation(teacher: Make, digit_batch: Batch) -> None:
    lcm = ConsistencyDistillation(teacher, 40)
    pcm = PhasedConsistencyDistillation(teacher, num_phases=1, num_grid_points=40)
    for module in (lcm, pcm):
        module.configure_model()
    draws = pcm.draw(digit_batch, torch_generator(0, "draws"))
    (first,), (second,) = (list(m.updates(digit_batch, draws)) for m in (lcm, pcm))
    assert float(first.loss) == float(second.loss) > 0


def test_the_target_is_the_teachers_guided_step_then_the_students_jump(
    teacher: Make, digit_batch: Batch
) -> None:
    """Against the step written out with plain arithmetic, sample by sample."""
    module = ConsistencyDistillation(teacher, 50, guidance_range=(2.0, 4.0))
    module.configure_model()
    torch.nn.init.normal_(module.student.backbone.transformer.proj_out_2.bias, std=0.1)  # type: ignore[union-attr, arg-type]
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    pair = module.pair(digit_batch, draws)
    schedule, x0 = module.schedule, digit_batch["sample"]
    for row in range(len(x0)):
        t = torch.tensor([20.0 * (int(draws.index[row]) + 1) - 1])
        p = (t - 20).clamp_min(0)
        label = digit_batch["cond"]["class_labels"][row : row + 1]
        x_t = schedule.add_noise(x0[row : row + 1], draws.noise[row : row + 1], t)
        with torch.no_grad():
            with_label = module.teacher(x_t, t, {"class_labels": label})
            without = module.teacher(x_t, t, {"class_labels": torch.tensor([10])})
            w = draws.guidance[row] - 1
            eps = (1 + w) * with_label.eps - w * without.eps
            clean = (1 + w) * with_label.x0 - w * without.x0
            alpha_p, sigma_p = schedule.alpha(p), schedule.sigma(p)
            x_p = (alpha_p * clean + sigma_p * eps).float()
            end = torch.zeros(1)
            jump = module.student(x_p, p, {"class_labels": label})
            target = x_p if float(p) == 0 else schedule.jump(jump, end)
        torch.testing.assert_close(pair.target[row : row + 1], target, atol=2e-5, rtol=1e-4)


def test_the_guidance_scale_is_drawn_from_the_range(teacher: Make, digit_batch: Batch) -> None:
    module = ConsistencyDistillation(teacher, 50, guidance_range=(4.0, 5.0))
    module.configure_model()
    batch: Batch = {**digit_batch, "sample": torch.zeros(5000, 1, 8, 8)}
    guidance = module.draw(batch, torch_generator(0, "draws")).guidance
    assert 4 <= float(guidance.min()) < 4.01
    assert 4.99 < float(guidance.max()) <= 5


def test_a_dropped_condition_is_dropped_for_student_target_and_solver_alike(
    teacher: Make, digit_batch: Batch
) -> None:
    module = ConsistencyDistillation(teacher, 50, cond_dropout=1.0)
    module.configure_model()
    seen: list[torch.Tensor] = []
    for network in (module.student, module.teacher):
        network.backbone.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
        )
    list(module.updates(digit_batch, module.draw(digit_batch, torch_generator(0, "draws"))))
    assert len(seen) == 3
    assert all((labels == 10).all() for labels in seen)


def test_lcm_boundary_differs_from_the_jump_only_by_the_trajectorys_end(
    teacher: Make, digit_batch: Batch
) -> None:
    """On the grid ``c_skip`` is at most 7e-6, so LCM's output is x0 where the jump ends at index 0:
    they differ by ``(alpha_0 - 1) x0 + sigma_0 eps``."""
    jump, lcm = (ConsistencyDistillation(teacher, 50, boundary=b) for b in ("jump", "lcm"))  # type: ignore[arg-type]
    for module in (jump, lcm):
        module.configure_model()
    draws = jump.draw(digit_batch, torch_generator(0, "draws"))
    first, second = (m.pair(digit_batch, draws).student for m in (jump, lcm))
    t = jump.phases.grid.times.home[draws.index]
    x_t = jump.schedule.add_noise(digit_batch["sample"], draws.noise, t)
    prediction = jump.student(x_t, t, digit_batch["cond"])
    alpha_0, sigma_0 = (
        float(f(torch.zeros(1))) for f in (jump.schedule.alpha, jump.schedule.sigma)
    )
    expected = (alpha_0 - 1) * prediction.x0 + sigma_0 * prediction.eps
    torch.testing.assert_close(first - second, expected, atol=5e-5, rtol=1e-3)


def test_the_ema_target_is_the_average_not_the_student(teacher: Make, digit_batch: Batch) -> None:
    module = ConsistencyDistillation(teacher, 50, target_network="ema", ema_decay=0.95)
    module.configure_model()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    before = module.pair(digit_batch, draws)
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = module.pair(digit_batch, draws)
    assert torch.equal(before.target, after.target)
    assert not torch.equal(before.student, after.student)


def test_an_ema_target_without_ema_is_refused(teacher: Make) -> None:
    with pytest.raises(FewstepError, match="needs an ema_decay"):
        ConsistencyDistillation(teacher, 50, target_network="ema", ema_decay=None)


def test_the_student_can_be_told_its_guidance_scale() -> None:
    def make() -> Denoiser:
        schedule = VPSchedule()
        network = RingMixture(schedule, 5, guidance_embedding_dim=32)
        torch.nn.init.normal_(network.outlet.weight, std=0.1)
        return Denoiser(network, schedule, "epsilon")

    module = ConsistencyDistillation(make, 50, guidance_range=(1.0, 6.0), guidance_embedding=True)
    module.configure_model()
    batch = ring_batch()
    draws = module.draw(batch, torch_generator(0, "draws"))
    seen: list[torch.Tensor] = []
    module.student.backbone.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["guidance"]), with_kwargs=True
    )
    list(module.updates(batch, draws))
    sample = module.sample(
        torch.randn(4, 2),
        {"class_labels": torch.arange(4)},
        2,
        torch_generator(0, "s"),
        role="student",
    )
    # student, target and both sampling steps were told; LCM embeds 1000 w with w = g - 1.
    assert len(seen) == 4
    assert sample.shape == (4, 2)
    frequency = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(16) / 15)
    expected = torch.sin(1000 * (draws.guidance[:, None] - 1) * frequency)
    torch.testing.assert_close(seen[0][:, :16], expected, atol=2e-3, rtol=0)


def test_a_backbone_without_guidance_input_refuses_the_embedding(teacher: Make) -> None:
    module = ConsistencyDistillation(teacher, 50, guidance_embedding=True)
    with pytest.raises(FewstepError, match="takes no guidance embedding"):
        module.configure_model()


def test_the_loss_is_the_configured_distance(teacher: Make, digit_batch: Batch) -> None:
    for loss, reference in (
        ("huber", lambda a, b: pseudo_huber(a, b, 0.05)),
        ("l2", lambda a, b: (a - b).square().mean()),
    ):
        module = ConsistencyDistillation(teacher, 50, loss=loss, huber_c=0.05)  # type: ignore[arg-type]
        module.configure_model()
        draws = module.draw(digit_batch, torch_generator(0, "draws"))
        pair = module.pair(digit_batch, draws)
        (update,) = list(module.updates(digit_batch, draws))
        assert float(update.loss) == pytest.approx(float(reference(pair.student, pair.target)))


def test_sampling_visits_evenly_spaced_grid_points(teacher: Make) -> None:
    module = ConsistencyDistillation(teacher, 50)
    module.configure_model()
    visited: list[float] = []
    module.student.backbone.register_forward_pre_hook(
        lambda _m, args: visited.append(float(args[1][0]))
    )
    noise, cond = torch.randn(2, 1, 8, 8), {"class_labels": torch.zeros(2, dtype=torch.long)}
    module.sample(noise, cond, 4, torch_generator(0, "s"), role="student")
    # The released LCM scheduler's times for 4 steps on 50 points.
    assert visited == [999, 759, 499, 259]
    with pytest.raises(FewstepError, match="serves 1 to 50 steps, not 51"):
        module.sample(noise, cond, 51)


def test_the_teacher_role_samples_along_the_ode_with_the_solvers_guidance(teacher: Make) -> None:
    module = ConsistencyDistillation(teacher, 50, guidance_range=(2.0, 4.0))
    module.configure_model()
    noise, cond = torch.randn(2, 1, 8, 8), {"class_labels": torch.tensor([3, 4])}
    reference = teacher()

    class AtThree:
        schedule = reference.schedule

        def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> object:
            return reference.guided(x, t, cond, 3.0)  # type: ignore[arg-type]

    expected = ode_sample(AtThree(), noise, cond, reference.schedule.spaced_times(5))  # type: ignore[arg-type]
    torch.testing.assert_close(module.sample(noise, cond, 5, role="teacher"), expected)
    assert module.sampling_evaluations(5, "teacher") == 10
    assert module.sampling_evaluations(5, "ema") == 5


def test_students_start_as_copies_that_do_not_share_weights(teacher: Make) -> None:
    module = ConsistencyDistillation(teacher, 50)
    module.configure_model()
    before = copy.deepcopy(module.teacher.state_dict())
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.zero_()
    assert all(torch.equal(v, module.teacher.state_dict()[k]) for k, v in before.items())
