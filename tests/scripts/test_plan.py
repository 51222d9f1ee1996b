"""What ``fewstep plan`` predicts, against what really happens."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scripts.trainer
from datamodules import Digits, Shards
from datamodules.fields import Caption, Images
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.gates import ResidualGates, gate_spec
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    Pretrained,
)
from scripts.main import main, run
from scripts.plan import Plan, Strategy, plan_of
from scripts.plan.roles import architecture_of, parameters_on_meta
from scripts.plan.step import ATTENTION, LiveMemory

from tiny_pipelines import save_stable_diffusion_xl

pytestmark = pytest.mark.threads

EXPERIMENTS = ["digits/teacher", "digits/lcm", "digits/pcm_1_adversarial"]
ROOT = Path(__file__).resolve().parents[2]
Planned = tuple[Plan, FewStepModule, pl.LightningDataModule]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def planned(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Planned]:
    """Plans through the command; gives the plan and the method, built for real."""

    def of(*arguments: str) -> Planned:
        found: list[Any] = []

        def keep(model: FewStepModule, data: pl.LightningDataModule, *rest: Any) -> Plan:
            source = getattr(model, "teacher_source", None)
            plan = plan_of(model, data, *rest)
            assert {p.device.type for p in model.parameters()} == {"meta"}
            for name in list(model._modules):
                del model._modules[name]
            if isinstance(source, str):
                spec, _ = architecture_of(source)
                cast(Any, model).teacher_source = lambda: Denoiser.from_spec(spec)
            model.configure_model()
            found[:] = [plan, model, data]
            return plan

        monkeypatch.setattr(scripts.trainer, "plan_of", keep)
        run(["plan", "-c", *arguments])
        return found[0], found[1], found[2]

    return of


class Real:
    """What autograd saves, and the FLOPs, in a real training step."""

    def __init__(self, module: FewStepModule) -> None:
        self.saved: list[int] = []
        self.flops = 0
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._known = {p.untyped_storage()._cdata for p in module.parameters()}
        self._step, self._backward = module.training_step, module.manual_backward
        patched: Any = module
        patched.training_step, patched.manual_backward = self.step, self.backward

    def step(self, *arguments: Any) -> None:
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        with counter, hooks:
            self._step(*arguments)
        self.flops = counter.get_total_flops()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._kept[storage._cdata] = storage
        return tensor

    def backward(self, *arguments: Any, **options: Any) -> None:
        self.saved.append(sum(storage.nbytes() for storage in self._kept.values()))
        self._kept.clear()
        self._backward(*arguments, **options)


def step(module: FewStepModule, data: pl.LightningDataModule, precision: Any = None) -> Real:
    measured = Real(module)
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return measured


@pytest.mark.parametrize(
    ("arguments", "devices", "sharded"),
    [
        (["--trainer.devices", "8", "--trainer.num_nodes", "4"], 32, False),
        (["--trainer.devices", "[0, 1, 3]", "--trainer.strategy", "fsdp2"], 3, True),
        (["--trainer.strategy", "fsdp2", "--devices", "64"], 64, True),
    ],
)
def test_a_plan_is_for_devices_that_need_not_be_here(
    here: Path, arguments: list[str], devices: int, sharded: bool
) -> None:
    gpus = ["--trainer.accelerator", "gpu"]
    run(["plan", "-c", "digits/teacher", *gpus, *arguments, "--json", "plan.json"])
    plan = json.loads(Path("plan.json").read_text())
    assert (plan["devices"], plan["strategy"]) == (devices, "fsdp2" if sharded else "ddp")


def test_the_configuration_a_run_left_can_be_planned(here: Path) -> None:
    quick = ["--trainer.max_steps", "1", "--trainer.callbacks", "[]", "--trainer.limit_val_batches"]
    run(["fit", "-c", "analytic/lcm", *quick, "0", "--run.version", "first"])
    run(["plan", "-c", "runs/analytic/lcm/first/config.yaml", "--json", "plan.json"])
    assert json.loads(Path("plan.json").read_text())["method"] == "ConsistencyDistillation"


def test_the_table_names_each_role(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "-c", "digits/teacher", "--json", "plan.json"])
    printed = capsys.readouterr().out
    assert "student     0.829 M       100%" in printed
    assert "1 forward, 1 backward" in printed
    assert "unknown" in printed
    plan = json.loads(Path("plan.json").read_text())
    assert plan["roles"][0]["parameters"] == 828_964
    assert plan["total_bytes"] == plan["resident_bytes"] + plan["temporary_bytes"]
    assert not Path("data").exists(), "planning made data"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
def test_a_plan_is_what_a_real_step_needs(
    experiment: str, precision: str, planned: Callable[..., Planned]
) -> None:
    plan, module, data = planned(experiment, "--trainer.precision", precision)
    assert plan.precision == precision
    assert plan.step is not None
    for role in plan.roles:
        parameters = list(getattr(module, role.role).parameters())
        assert role.weights == sum(p.nbytes for p in parameters)
        assert role.gradients == sum(p.nbytes for p in parameters if p.requires_grad)
    real = step(module, data, precision)
    assert list(plan.step.saved.values()) == pytest.approx(real.saved, rel=0.15)
    assert plan.step.activations >= max(real.saved)
    assert plan.step.flops == real.flops > 0
    for name, optimizer in zip(module.trained_roles, module.trainer.optimizers, strict=True):
        states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        (role,) = (role for role in plan.roles if role.role == name)
        assert role.optimizer == sum(state.nbytes for state in states)


@pytest.mark.slow
def test_accumulation_saves_activations_and_no_work(planned: Callable[..., Planned]) -> None:
    whole, _, _ = planned("digits/lcm")
    split, module, data = planned("digits/lcm", "--model.init_args.accumulate", "3")
    assert whole.step is not None
    assert split.step is not None
    assert split.step.saved["student"] == pytest.approx(43 / 128 * whole.step.saved["student"], 0.1)
    real = step(module, data)
    assert len(real.saved) == 3
    assert split.step.flops == real.flops == whole.step.flops


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "analytic/lcm"])
def test_declared_evaluations_are_those_of_a_step(
    experiment: str, planned: Callable[..., Planned]
) -> None:
    plan, module, data = planned(experiment)
    rows: dict[str, int] = {}
    for role in plan.roles:
        backbone = getattr(getattr(module, role.role), "backbone", None)

        def count(_: Any, inputs: Any, name: str = role.role) -> None:
            rows[name] = rows.get(name, 0) + len(inputs[0])

        if backbone is not None:
            rows[role.role] = 0
            backbone.register_forward_pre_hook(count)
    step(module, data)
    declared = {r.role: r.forward * plan.data.batch_size for r in plan.roles if r.role in rows}
    assert declared == rows


def small(optimizer: Any = torch.optim.AdamW) -> DiffusionTraining:
    return DiffusionTraining(lambda: DiT(8, 1), VPSchedule(), "v_prediction", optimizer=optimizer)


@pytest.mark.parametrize(("momentum", "states"), [(0.0, 0), (0.9, 4)])
def test_optimiser_states_are_those_of_the_optimiser(momentum: float, states: int) -> None:
    plan = plan_of(small(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)), Digits())
    assert plan.roles[0].optimizer == states * plan.roles[0].parameters


def digit_teacher() -> Denoiser:
    return Denoiser(DiT(8, 1), VPSchedule(), "v_prediction")


def test_frozen_roles_in_half_precision_are_half_as_large() -> None:
    whole, half = (
        plan_of(ConsistencyDistillation(digit_teacher, 20, frozen_precision=p), Digits())
        for p in ("float32", "bfloat16")
    )
    for there, here in zip(whole.roles, half.roles, strict=True):
        assert there.weights == here.weights * (2 if there.role == "teacher" else 1)


def test_frozen_roles_that_are_not_sharded_are_whole_on_each_device() -> None:
    module = ConsistencyDistillation(digit_teacher, 20, shard_frozen=False)
    plan = plan_of(module, Digits(), devices=4, strategy="fsdp2")
    roles = {role.role: role for role in plan.roles}
    assert roles["teacher"].weights == pytest.approx(4 * roles["student"].weights, 1e-3)


def test_a_precision_that_methods_refuse_is_not_planned() -> None:
    with pytest.raises(FewstepError, match="bf16-mixed"):
        plan_of(small(), Digits(), precision="bf16-true")


@pytest.mark.slow
def test_sharding_divides_all_but_a_block_and_replication_nothing() -> None:
    alone, replicas = plan_of(small(), Digits()), plan_of(small(), Digits(), devices=4)
    shards = plan_of(small(), Digits(), devices=4, strategy="fsdp2")
    assert replicas.resident == alone.resident
    assert replicas.buckets == alone.roles[0].gradients
    assert shards.resident == pytest.approx(alone.resident / 4, 1e-3)
    assert shards.resident > alone.resident / 4, "the embeddings of 11 labels are 3 at most"
    assert 0 < shards.gathered < alone.roles[0].weights
    replicated, sharded = (
        plan_of(small(), Digits(), 4, strategy, "bf16-mixed").step
        for strategy in cast(tuple[Strategy, ...], ("ddp", "fsdp2"))
    )
    assert replicated is not None
    assert sharded is not None
    casts = replicated.saved["student"] - sharded.saved["student"]
    assert 0 < casts <= alone.roles[0].weights / 2, "FSDP2 keeps casts of no weights"
    assert shards.samples == replicas.samples == 4 * alone.samples


@pytest.mark.slow
def test_text_whose_null_condition_is_zeros_has_a_known_shape(tmp_path: Path) -> None:
    """SDXL: its unconditional branch gets zeros, so no text encoder says how long text is."""
    base = save_stable_diffusion_xl(tmp_path / "sdxl")
    data = Shards("none.tar", "none.tar", 2, Images(16), {"prompt": Caption()})
    method = ConsistencyDistillation(
        Pretrained(str(base), (16, 16)), guidance_range=(2.0, 3.0), guidance_embedding=True
    )
    plan = plan_of(method, data)
    assert plan.notes == []
    assert plan.step is not None
    assert plan.step.flops > 0
    backbone = cast(Any, method.student.backbone)
    encoded = load_denoiser_of(base, (16, 16)).text.encode(["a"])
    assert backbone.text_shapes == {name: value.shape[1:] for name, value in encoded.items()}


def test_an_optimiser_that_cannot_be_tried_is_taken_for_adam() -> None:
    def refuses(parameters: Any) -> torch.optim.Optimizer:
        raise TypeError("no")

    plan = plan_of(small(refuses), Digits())
    assert plan.roles[0].optimizer == 8 * plan.roles[0].parameters
    assert any("assumed for student" in note for note in plan.notes)


def test_updates_an_epoch_are_known_from_indexes_alone(here: Path) -> None:
    assert plan_of(small(), Digits()).updates_per_epoch is None
    Digits().prepare_data()
    plan = plan_of(small(), Digits(), devices=2)
    assert plan.data.records == 1617
    assert plan.updates_per_epoch == 1617 / 256


def test_a_teacher_is_read_from_its_checkpoint_without_weights(here: Path) -> None:
    folder = here / "runs/other/version_0/checkpoints"
    folder.mkdir(parents=True)
    denoiser = Denoiser(DiT(8, 1, num_layers=1), VPSchedule(), "v_prediction")
    torch.save(
        {"fewstep": {"denoiser": denoiser.to_spec()}, "state_dict": {}}, folder / "last.ckpt"
    )
    spec, note = architecture_of("runs/other")
    assert spec["backbone"]["init_args"]["num_layers"] == 1
    assert note is None
    _, note = architecture_of("runs/digits/lcm")
    assert note is not None
    assert "no checkpoint yet" in note


def test_steering_a_network_that_a_factory_makes_can_be_planned(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["plan", "-c", "guidance/digits/few_polyak"])
    said = capsys.readouterr().out
    assert "0 forward" in said  # nothing is trained
    assert "'runs/digits/lcm' holds no checkpoint yet" in said


@pytest.mark.parametrize("trains", ["backbone", "teacher", "start"])
def test_the_gates_of_a_teacher_yet_to_be_trained_are_planned(trains: str, here: Path) -> None:
    network = {
        "backbone": {"class_path": "fewstep.networks.DiT", "init_args": {"sample_size": 8}},
        "schedule": {"class_path": "fewstep.diffusion.VPSchedule"},
    }
    network["backbone"]["init_args"] |= {"channels": 1, "num_layers": 1}
    teacher = {"class_path": "fewstep.diffusion.Denoiser", "init_args": network}
    options: dict[str, Any] = network if trains == "backbone" else {trains: teacher}
    file = here / "experiments" / "gated.yaml"
    file.parent.mkdir()
    gates = {"mode": "alpha", "level": "block"}
    file.write_text(json.dumps({"model": {"init_args": {**options, "gates": gates}}}))
    spec, _ = architecture_of("runs/gated")
    planned = Denoiser.from_spec({"prediction_type": "epsilon", **spec})
    assert gate_spec(planned) == ResidualGates(mode="alpha", level="block")
    file.write_text(json.dumps({"model": {"init_args": {**options, "gates": None}}}))
    assert "changes" not in architecture_of("runs/gated")[0]["backbone"]


def test_a_teacher_nobody_knows_is_one_message(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-c", "digits/lcm", "--model.init_args.teacher", "runs/nothing"]) == 2
    assert "No checkpoint at 'runs/nothing'" in capsys.readouterr().err


def test_building_without_weights_leaves_torch_as_it_was() -> None:
    with parameters_on_meta():
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_live_memory_counts_what_is_alive_once() -> None:
    known = torch.ones(1000)
    with LiveMemory([known]) as memory:
        doubled = known * 2
        view = doubled[:10]
        known.add_(1)
        assert memory.live == 4000
        del doubled
        assert memory.live == 4000, "a view keeps its storage"
        del view
        assert memory.live == 0
        assert memory.peak == 4000


BIG = """
import sys
from pathlib import Path
from scripts.main import main
status = main(sys.argv[1:])
# Not getrusage, whose peak a child process inherits.
print("KiB", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_two_billion_parameters_need_neither_memory_nor_patience(here: Path) -> None:
    sizes = {"sample_size": 32, "channels": 4, "num_layers": 28, "num_heads": 20, "head_dim": 96}
    options = [
        f"--model.init_args.backbone.init_args.{name}={value}" for name, value in sizes.items()
    ]
    started = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", BIG, "plan", "-c", "digits/teacher", *options],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert "1,983.873 M" in found.stdout
    assert "GiB" in found.stdout.split("activations")[1], found.stdout
    assert int(found.stdout.split("KiB")[-1]) < 2**20
    assert time.monotonic() - started < 240
