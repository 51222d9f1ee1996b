"""What every method inherits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import Checkpoints
from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import load_denoiser
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
)

Fit = Callable[..., pl.Trainer]


def make(method: str, teacher: Callable[[], Denoiser], **options: Any) -> FewStepModule:
    """One of the methods, on the tiny networks."""
    optimizer = options.pop("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-3))
    if method == "diffusion":
        network = teacher().backbone
        return DiffusionTraining(
            lambda: copy.deepcopy(network),
            VPSchedule(),
            "v_prediction",
            optimizer=optimizer,
            **options,
        )
    if method == "lcm":
        return ConsistencyDistillation(teacher, 50, optimizer=optimizer, **options)
    adversarial = {"adversarial_weight": 0.1} if method == "adversarial" else {}
    return PhasedConsistencyDistillation(
        teacher,
        4,
        40,
        optimizer=optimizer,
        discriminator_optimizer=optimizer,
        **adversarial,
        **options,
    )


METHODS = ["diffusion", "lcm", "pcm", "adversarial"]


@pytest.mark.parametrize("method", METHODS)
def test_global_step_counts_student_updates(
    method: str, teacher: Callable[[], Denoiser], fit: Fit
) -> None:
    trainer = fit(make(method, teacher), updates=3)
    assert trainer.global_step == 3
    assert trainer.fit_loop.epoch_loop.batch_idx == 2


def test_checkpoints_come_at_the_stated_student_updates(
    teacher: Callable[[], Denoiser], fit: Fit, tmp_path: Path
) -> None:
    fit(make("adversarial", teacher), 5, callbacks=[Checkpoints(every_n_updates=2, keep=None)])
    found = sorted(p.name for p in (tmp_path / "checkpoints").glob("*"))
    assert found == ["last.ckpt", *(f"update_{n:08d}.ckpt" for n in (2, 4, 5))]
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["fewstep"]["student_updates"] == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_is_bit_equal_to_an_undisturbed_one(
    method: str, accumulate: int, teacher: Callable[[], Denoiser], fit: Fit, tmp_path: Path
) -> None:
    whole = make(method, teacher, accumulate=accumulate, warmup_updates=3, lr_decay="cosine")
    trainer = fit(whole, 6, callbacks=[Checkpoints(every_n_updates=2, keep=None)])
    resumed = make(method, teacher, accumulate=accumulate, warmup_updates=3, lr_decay="cosine")
    again = fit(resumed, 6, ckpt_path=str(tmp_path / "checkpoints" / "update_00000002.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for first, second in zip(trainer.optimizers, again.optimizers, strict=True):
        for a, b in zip(
            first.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True
        ):
            assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_changes_nothing_but_memory(
    method: str, teacher: Callable[[], Denoiser], fit: Fit
) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05)

    plain, split = (make(method, teacher, accumulate=n, optimizer=sgd) for n in (1, 4))
    for module in (plain, split):
        torch.manual_seed(0)  # the discriminator's heads start at random
        fit(module, 2)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, split.state_dict()[name], atol=2e-6, rtol=1e-4)


class NoSynchronisation(TorchDispatchMode):
    """Fails on every operation that would make the host wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} synchronises"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_never_waits_for_the_device(
    method: str,
    teacher: Callable[[], Denoiser],
    fit: Fit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plain_step(parameters: Any) -> torch.optim.Optimizer:
        # CPU Adam reads its step count on the host; CUDA's foreach Adam does not.
        return torch.optim.SGD(parameters, lr=1e-3)

    options = {} if method == "diffusion" else {"guidance_range": (1.5, 2.5), "cond_dropout": 0.1}
    module = make(method, teacher, optimizer=plain_step, accumulate=2, **options)
    step = module.training_step
    calls = []

    def watched(*args: Any) -> None:
        with NoSynchronisation():
            step(*args)
        calls.append(1)

    monkeypatch.setattr(module, "training_step", watched)
    fit(module, 2)
    assert len(calls) == 2


def test_the_watch_itself_sees_a_synchronisation() -> None:
    with pytest.raises(AssertionError, match="synchronises"), NoSynchronisation():
        torch.ones(()).item()


def test_ema_is_the_weighted_mean_of_the_students_so_far(
    teacher: Callable[[], Denoiser], fit: Fit
) -> None:
    module = make("lcm", teacher, ema_decay=0.9, ema_warmup=False)
    students: list[dict[str, torch.Tensor]] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            students.append(copy.deepcopy(pl_module.student.state_dict()))

    initial = teacher().state_dict()
    fit(module, 3, callbacks=[Recorder()])
    assert module.ema is not None
    for name, averaged in module.ema.state_dict().items():
        expected = initial[name] * 0.9**3
        for age, student in enumerate(reversed(students)):
            expected = expected + 0.1 * 0.9**age * student[name]
        torch.testing.assert_close(averaged, expected)


def test_a_checkpoint_holds_no_frozen_weights_but_says_where_they_came_from(
    teacher: Callable[[], Denoiser], fit: Fit, tmp_path: Path
) -> None:
    first = make("diffusion", teacher)
    fit(first, 2, callbacks=[Checkpoints()])
    source = tmp_path / "checkpoints" / "last.ckpt"
    teacher_file = tmp_path / "teacher.ckpt"
    teacher_file.write_bytes(source.read_bytes())
    module = ConsistencyDistillation(str(teacher_file), 50)
    fit(module, 2, callbacks=[Checkpoints()])
    saved = torch.load(source, weights_only=True)
    assert not [name for name in saved["state_dict"] if name.startswith("teacher")]
    origin = saved["fewstep"]["frozen"]["teacher"]
    assert origin["source"] == str(teacher_file)
    assert len(origin["sha256"]) == 64
    assert module.teacher.training is False


def test_the_teacher_does_not_change_and_needs_no_gradient(
    teacher: Callable[[], Denoiser], fit: Fit
) -> None:
    module = make("adversarial", teacher)
    fit(module, 3)
    for name, value in teacher().state_dict().items():
        assert torch.equal(value, module.teacher.state_dict()[name])  # type: ignore[union-attr,operator]
    assert all(p.grad is None for p in module.teacher.parameters())  # type: ignore[union-attr,operator]


def test_a_checkpoint_of_another_experiment_is_refused_with_the_difference(
    teacher: Callable[[], Denoiser], fit: Fit, tmp_path: Path
) -> None:
    fit(make("pcm", teacher), 2, callbacks=[Checkpoints()])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    other = PhasedConsistencyDistillation(teacher, num_phases=8, num_grid_points=40)
    with pytest.raises(FewstepError, match=r"phases.num_phases: 4 in the checkpoint, 8 in this"):
        fit(other, 4, ckpt_path=last)
    with pytest.raises(FewstepError, match=r"method: 'PhasedConsistencyDistillation' in the"):
        fit(make("lcm", teacher), 4, ckpt_path=last)


def test_missing_weights_are_an_error_that_names_them(
    teacher: Callable[[], Denoiser], fit: Fit, tmp_path: Path
) -> None:
    fit(make("pcm", teacher, ema_decay=None), 2, callbacks=[Checkpoints()])
    with pytest.raises(FewstepError, match="missing ema"):
        fit(make("pcm", teacher), 4, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance", [None, (1.5, 2.5)])
def test_declared_network_evaluations_are_those_counted(
    method: str,
    guidance: tuple[float, float] | None,
    teacher: Callable[[], Denoiser],
    digit_batch: Batch,
) -> None:
    options = {} if method == "diffusion" else {"guidance_range": guidance}
    module = make(method, teacher, **options)
    module.configure_model()
    samples: dict[str, int] = {}

    def count(role: str) -> Any:
        def hook(_module: Any, args: Any, *_: Any) -> None:
            samples[role] = samples.get(role, 0) + len(args[0])

        return hook

    for role in ("student", "teacher", "ema"):
        network = getattr(module, role, None)
        if isinstance(network, Denoiser):
            network.backbone.register_forward_pre_hook(count(role))
    draws = module.draw(digit_batch, torch.Generator().manual_seed(0))
    for update in module.updates(digit_batch, draws):
        update.loss.backward()
    size = len(digit_batch["sample"])
    declared = {r: e.forward for r, e in module.evaluations().items() if r != "discriminator"}
    assert {role: n / size for role, n in samples.items()} == declared


def test_a_students_checkpoint_serves_as_a_teacher(
    teacher: Callable[[], Denoiser], fit: Fit, tmp_path: Path
) -> None:
    module = make("diffusion", teacher)
    fit(module, 2, callbacks=[Checkpoints()])
    loaded = load_denoiser(tmp_path)
    assert module.ema is not None
    for name, value in module.ema.state_dict().items():
        assert torch.equal(value, loaded.denoiser.state_dict()[name])
    assert loaded.denoiser.prediction_type == "v_prediction"


def test_an_unknown_role_cannot_sample(teacher: Callable[[], Denoiser]) -> None:
    module = make("diffusion", teacher)
    module.configure_model()
    with pytest.raises(FewstepError, match=r"choose from \['ema', 'student'\]"):
        module.sample(torch.randn(2, 1, 8, 8), None, 2, role="teacher")


@pytest.mark.parametrize("sizes", [(2, 1, 2, 1), (8, 7, 8, 8), (8, 8, 8, 8)])
def test_no_two_samples_of_an_update_share_their_draws(
    sizes: tuple[int, ...], teacher: Callable[[], Denoiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make("lcm", teacher)
    module.configure_model()
    noises = []
    for rank, size in enumerate(sizes):
        trainer = SimpleNamespace(datamodule=SimpleNamespace(batch_size=8))
        monkeypatch.setattr(type(module), "trainer", trainer)
        monkeypatch.setattr(type(module), "global_rank", rank)
        sample = torch.zeros(size, *module.sample_shape)
        batch: Batch = {"sample": sample, "cond": {}, "key": [""] * size}
        noises.append(module._draws(batch, "train", 0).noise)  # type: ignore[attr-defined]
    assert [len(noise) for noise in noises] == list(sizes)
    assert len({tuple(row) for row in torch.cat(noises).flatten(1).tolist()}) == sum(sizes)
