"""Methods that train residual gates: on what, with which optimiser, on several devices, resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT, UViT, load_denoiser
from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gate_parameters,
    gate_tensors,
    is_gated,
)
from fewstep.networks.lora import LoRA
from lightning_modules import ConsistencyDistillation, DiffusionTraining, FewStepModule
from lightning_modules.parallel import units_of

from ranks import run_ranks
from tiny_pipelines import save_stable_diffusion
from training_runs import (
    GATES,
    assert_same_run,
    data_for,
    method,
    run,
    teacher,
    trained,
    trainer_of,
    whole,
)

METHODS = ["teacher", "lcm", "pcm", "adversarial", "mcm", "apt"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gates_its_student_and_no_teacher(name: str) -> None:
    module = method(name, gates=ResidualGates())
    module.configure_model()
    assert is_gated(module.student)
    assert module.ema is not None
    assert gate_tensors(module.ema).keys() == gate_tensors(module.student).keys()
    assert not any(map(is_gated, (getattr(module, role) for role in module.frozen_roles)))
    assert all(p.requires_grad for p in gate_parameters(module.student))
    assert not any(p.requires_grad for p in gate_parameters(module.ema))


def optimizer_of(module: FewStepModule) -> torch.optim.Optimizer:
    module.configure_model()
    module._trainer = trainer_of("single", 1, 3)
    found: torch.optim.Optimizer = module.configure_optimizers()[0][0]
    return found


def test_gates_have_a_group_without_weight_decay_and_a_rate_of_their_own() -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    module = method("lcm", gates=ResidualGates(), gates_lr=5.0, optimizer=optimizer)
    others, gates = optimizer_of(module).param_groups
    assert (others["weight_decay"], gates["weight_decay"]) == (0.1, 0.0)
    assert gates["initial_lr"] == pytest.approx(5 * others["initial_lr"])
    assert list(map(id, gates["params"])) == list(map(id, gate_parameters(module.student)))
    assert len(others["params"]) + len(gates["params"]) == len(list(module.student.parameters()))
    (ungated,) = optimizer_of(method("lcm", optimizer=optimizer)).param_groups
    assert ungated["weight_decay"] == 0.1


def test_gates_alone_can_be_trained(tmp_path: Path) -> None:
    module = method("teacher", gates=ResidualGates(), train_only="gates")
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.student.named_parameters()}
    trainer = trainer_of("single", 1, 2)
    trainer.fit(module, data_for("teacher"))
    (group,) = trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.0
    assert module.ema is not None
    averaged = dict(module.ema.named_parameters())
    for name, value in module.student.named_parameters():
        is_gate = "rdm_gate" in name
        assert torch.equal(value, before[name]) != is_gate, name
        assert torch.equal(averaged[name], before[name]) != is_gate, name
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_denoiser(tmp_path / "last.ckpt").denoiser
    for name, value in loaded.named_parameters():
        assert torch.equal(value, averaged[name])


def test_gates_with_a_rate_of_zero_stay_where_they_start_and_all_else_is_trained() -> None:
    gates = ResidualGates(mode="alpha", init="depth")
    make = partial(UViT, 8, 1, num_layers=2, num_heads=2, head_dim=8, long_skips=False)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    module = DiffusionTraining(
        make, VPSchedule(), "v_prediction", optimizer=optimizer, gates=gates, gates_lr=0.0
    )
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.student.named_parameters()}
    trainer_of("single", 1, 2).fit(module, data_for("teacher"))
    for name, value in module.student.named_parameters():
        assert torch.equal(value, before[name]) == ("rdm_gate" in name), name
    alphas = [1 + p.item() for p in gate_parameters(module.student)]
    assert alphas == pytest.approx([0.5] * 4)


class Gates(pl.Callback):
    """What all gates are after each update."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.seen.append([whole(p) for p in gate_parameters(module.student)])


def test_gates_wait_where_they_start_as_long_as_they_are_held_also_when_resumed(
    tmp_path: Path,
) -> None:
    def fitted(updates: int, resume: Path | None = None) -> tuple[pl.Trainer, Any, Gates]:
        pl.seed_everything(0, verbose=False)
        module, gates = method("gated", gates_hold=3, gates_lr=1.0), Gates()
        trainer = trainer_of("single", 1, updates, gates)
        trainer.fit(module, data_for("gated"), ckpt_path=resume, weights_only=True)
        return trainer, module, gates

    start = method("gated")
    start.configure_model()
    first = gate_parameters(start.student)
    _, module, gates = fitted(5)
    for number, seen in enumerate(gates.seen, 1):
        assert all(map(torch.equal, seen, first)) == (number <= 3), number
    moved = dict(module.student.named_parameters())
    for name, value in start.student.named_parameters():
        assert not torch.equal(moved[name], value), name
    for at, held in ((2, 1), (3, 0)):
        trainer, _, _ = fitted(at)
        trainer.save_checkpoint(tmp_path / f"{at}.ckpt")
        _, _, again = fitted(5, tmp_path / f"{at}.ckpt")
        assert len(again.seen) == 5 - at
        for number, (seen, wanted) in enumerate(zip(again.seen, gates.seen[at:], strict=True), 1):
            assert all(map(torch.equal, seen, wanted))
            assert all(map(torch.equal, seen, first)) == (number <= held)


@pytest.mark.parametrize("steps", [0, 3])
def test_held_gates_follow_the_schedule_of_all_others_once_they_move(steps: int) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = method("lcm", gates=ResidualGates(), gates_lr=5.0, gates_hold=3, optimizer=optimizer)
    module.configure_model()
    module._trainer = trainer_of("single", 1, 10)
    (made,), (schedule,) = module.configure_optimizers()
    for _ in range(steps):
        made.step()
        schedule.step()
    others, gates = schedule.get_last_lr()
    assert others > 0
    assert gates == pytest.approx(0.0 if steps < 3 else 5 * others)


def test_a_run_says_where_its_gates_are_once(capsys: pytest.CaptureFixture[str]) -> None:
    module = method("teacher", gates=ResidualGates(include=["attn1"], init="ode"))
    trainer_of("single", 1, 1).fit(module, data_for("teacher"))
    told = capsys.readouterr().out
    assert told.count("Gates on the student:\n  2 x transformer_blocks.0-1.attn1.to_out.0.") == 1
    assert "2 gates with 34 parameters: mode alpha_beta at the branch level, init ode" in told
    assert "ff" not in told
    method("gated").configure_model()  # as a plan or an export does
    trainer_of("single", 1, 1).fit(method("teacher"), data_for("teacher"))
    assert "Gates on" not in capsys.readouterr().out


def untrained(**options: Any) -> FewStepModule:
    network = partial(DiT, 8, 1, num_layers=2, num_heads=2, head_dim=8)
    return DiffusionTraining(network, VPSchedule(), "v_prediction", **options)


def gated_teacher() -> Denoiser:
    made = teacher()
    apply_gates(made, ResidualGates())
    return made


def test_a_gated_teacher_gives_its_student_gates() -> None:
    module = ConsistencyDistillation(gated_teacher, 20, train_only="gates")
    module.configure_model()
    trainable = [id(p) for p in module.student.parameters() if p.requires_grad]
    assert trainable == list(map(id, gate_parameters(module.student)))
    assert not any(p.requires_grad for p in module.teacher.parameters())


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: method("lcm", train_only="gates"), "leaves nothing to train"),
        (
            lambda: method("lcm", gates=ResidualGates(mode="none"), train_only="gates"),
            "a mode other than none",
        ),
        (lambda: untrained(gates=GATES, train_only="gates"), "Start from trained weights"),
        (lambda: ConsistencyDistillation(gated_teacher, 20, gates=GATES), "leave out `gates`"),
        (lambda: method("lcm", lora=LoRA(rank=2), gates=GATES), "leave out `lora`"),
        (lambda: method("lcm", lora=LoRA(rank=2), train_only="gates"), "leave out `lora`"),
        (lambda: method("gated", gates_hold=-1), "from 0 on, not -1"),
        (lambda: method("gated", gates_hold=9, train_only="gates"), "in the 9 updates"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    make: Callable[[], FewStepModule], complaint: str
) -> None:
    with pytest.raises(FewstepError, match=complaint):
        make().configure_model()


@pytest.mark.parametrize("init", ["depth", "ode", "zero"])
@pytest.mark.parametrize("name", ["lcm", "apt", "goes on"])
def test_gates_that_would_spoil_what_a_student_was_copied_from_are_refused(
    name: str, init: Any
) -> None:
    gates = ResidualGates(init=init)
    module = (
        DiffusionTraining(start=teacher, gates=gates)
        if name == "goes on"
        else method(name, gates=gates)
    )
    with pytest.raises(FewstepError, match=f"gates.init {init} would change what .* copied from"):
        module.configure_model()


def test_a_guidance_input_that_gates_alone_would_never_train_is_refused(tmp_path: Path) -> None:
    base = str(save_stable_diffusion(tmp_path / "sd"))
    options: dict[str, Any] = {"guidance_range": (2.0, 3.0), "guidance_embedding": True}
    made = ConsistencyDistillation(base, gates=ResidualGates(), train_only="gates", **options)
    with pytest.raises(FewstepError, match=r"'time_embedding.cond_proj'.* without effect"):
        made.configure_model()
    ConsistencyDistillation(base, gates=ResidualGates(), **options).configure_model()


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.parametrize(
    "options",
    [{}, {"train_only": "gates", "checkpoint_activations": True}],
    ids=["all", "gates alone, recomputed"],
)
def test_two_ranks_train_gates_as_one_device_does(kind: str, options: dict[str, Any]) -> None:
    (alone,) = trained(1, "single", "gated", **options)
    first, second = trained(2, kind, "gated", **options)
    assert first[2] == (kind == "fsdp")
    assert_same_run(first, alone)
    gates = [name for name in first[0] if "rdm_gate" in name]
    assert gates
    for name in gates:
        assert torch.equal(first[0][name], second[0][name]), name


def test_gates_are_units_that_stay_in_full_precision() -> None:
    units = list(units_of(gated_teacher()))
    gates = [unit for unit in units if "Gate" in type(unit.module).__name__]
    assert len(gates) == 4
    assert not any(unit.narrow for unit in gates)
    assert all(unit.narrow for unit in units if unit not in gates)


class Seen(pl.Callback):
    """The dtypes that gates and other layers compute in, and whether gates are sharded."""

    def __init__(self) -> None:
        self.dtypes: dict[str, set[torch.dtype]] = {"gate": set(), "layer": set()}
        self.sharded = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        block = pl_module.get_submodule("student.backbone.transformer.transformer_blocks.1.ff.net")
        layer: Any = block.get_submodule("2")
        self.sharded = isinstance(layer.rdm_gate.delta, DTensor)
        kept = self.dtypes
        layer.rdm_gate.register_forward_hook(lambda gate, *_: kept["gate"].add(gate.delta.dtype))
        layer.register_forward_hook(lambda layer, *_: kept["layer"].add(layer.weight.dtype))


def _dtypes_under_fsdp2() -> tuple[bool, dict[str, set[torch.dtype]]]:
    torch.set_num_threads(1)
    module, seen = method("gated"), Seen()
    trainer = trainer_of("fsdp", 2, 1, seen, precision="bf16-mixed")
    trainer.fit(module, data_for("gated"))
    return seen.sharded, seen.dtypes


def test_sharded_gates_are_float32_where_the_network_computes_in_bfloat16() -> None:
    for sharded, dtypes in run_ranks(2, _dtypes_under_fsdp2):
        assert sharded
        assert dtypes == {"gate": {torch.float32}, "layer": {torch.bfloat16}}


@pytest.mark.parametrize("kind", ["single", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_resumed_gated_run_is_bit_equal_to_the_undisturbed_one(kind: str, tmp_path: Path) -> None:
    world = 1 if kind == "single" else 2
    undisturbed = run_ranks(world, run, tmp_path, kind, world, "gated", 4, None, None, 2)
    checkpoint = tmp_path / "checkpoints" / "update_00000002.ckpt"
    again = tmp_path / "again"
    resumed = run_ranks(world, run, again, kind, world, "gated", 4, None, checkpoint, 2)
    for (states, _), (expected, _) in zip(resumed, undisturbed, strict=True):
        assert states.keys() == expected.keys()
        assert any("rdm_gate" in name for name in states)
        for name, value in expected.items():
            assert torch.equal(states[name], value), name


def test_a_checkpoint_of_other_gates_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("single", 1, 1)
    trainer.fit(method("gated"), data_for("gated"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = method("teacher", gates=ResidualGates(mode="alpha"))
    again = trainer_of("single", 1, 2)
    with pytest.raises(FewstepError, match="of another experiment"):
        again.fit(other, data_for("gated"), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_training_from_trained_gates_goes_on_with_them(tmp_path: Path) -> None:
    trainer = trainer_of("single", 1, 1)
    module = method("gated")
    trainer.fit(module, data_for("gated"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    goes_on = DiffusionTraining(start=str(tmp_path / "last.ckpt"), train_only="gates")
    goes_on.configure_model()
    assert module.ema is not None
    wanted = gate_tensors(module.ema)
    assert all(torch.equal(whole(v), wanted[n]) for n, v in gate_tensors(goes_on.student).items())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("single", 1), ("fsdp", 2)])
def test_gates_in_compiled_blocks_train_as_others_do(
    kind: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced, split at what cannot be traced and differentiated as ever, without generated code.
    traced = partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    (alone,) = trained(1, "single", "gated")
    compiled = trained(world, kind, "gated", compile_blocks=True)
    assert compiled[0][2] == (kind == "fsdp")
    assert_same_run(compiled[0], alone)
