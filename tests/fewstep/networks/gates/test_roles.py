"""Gates on denoisers: in checkpoints, sharded, and beside adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gate_parameters,
    gates_of,
    is_gated,
    merge_gates,
)
from fewstep.networks.lora import LoRA, share_base
from lightning_modules.parallel import shard
from scripts.export.folder import plain_network, write_network

GIVEN = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
T = torch.tensor([900.0, 100.0])
COND = {"class_labels": torch.tensor([1, 2])}


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(DiT(8, 3, num_layers=2, num_heads=2, head_dim=8), VPSchedule(), "epsilon")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made.eval()


@torch.no_grad()
def disturb(model: torch.nn.Module, std: float = 0.1) -> None:
    for parameter in gate_parameters(model):
        parameter.add_(std * torch.randn_like(parameter))


def raw(model: Denoiser) -> Tensor:
    return model.raw(GIVEN[0], T, COND)


@pytest.mark.parametrize(
    "spec",
    [
        ResidualGates(init="zero", time_conditioned=True),
        ResidualGates(mode="full", level="block", exclude=["blocks.0"]),
    ],
)
def test_a_checkpoint_rebuilds_a_gated_denoiser(spec: ResidualGates, tmp_path: Path) -> None:
    student = denoiser()
    plain = student.to_spec()
    apply_gates(student, spec)
    disturb(student)
    torch.save({"spec": student.to_spec(), "weights": student.state_dict()}, tmp_path / "c")
    saved = torch.load(tmp_path / "c", weights_only=True)
    rebuilt = Denoiser.from_spec(saved["spec"]).eval()
    rebuilt.load_state_dict(saved["weights"])
    assert torch.equal(raw(rebuilt), raw(student))
    assert rebuilt.to_spec() == student.to_spec() != plain
    assert "changes" not in plain["backbone"]
    twin = copy.deepcopy(student)
    for parameter in gate_parameters(twin):
        torch.nn.init.zeros_(parameter)
    merge_gates(twin)
    assert twin.to_spec() == plain
    assert twin.state_dict().keys() == denoiser().state_dict().keys()
    assert is_gated(student)


def test_a_checkpoint_names_no_change_that_is_none() -> None:
    spec = denoiser().to_spec()
    spec["backbone"]["changes"] = [{"class_path": "fewstep.networks.DiT", "init_args": {}}]
    with pytest.raises(FewstepError, match="where a Change belongs"):
        Denoiser.from_spec(spec)


def test_gates_and_adapters_exclude_each_other() -> None:
    pytest.importorskip("peft")
    gated = denoiser()
    apply_gates(gated, ResidualGates())
    with pytest.raises(FewstepError, match=r"merge them into the weights first \(merge_gates\)"):
        share_base(gated, LoRA(rank=2))
    merge_gates(gated)
    shared = share_base(gated, LoRA(rank=2))
    for adapted in (shared.student, shared.teacher):
        with pytest.raises(FewstepError, match="has LoRA adapters"):
            apply_gates(adapted, ResidualGates())


def test_an_exported_network_has_its_gates_merged(tmp_path: Path) -> None:
    student = denoiser()
    apply_gates(student, ResidualGates())
    disturb(student)
    expected = raw(student)
    write_network(plain_network(student), tmp_path, half=False)
    read = denoiser()
    transformer = type(read.backbone.transformer)
    read.backbone.transformer = transformer.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    torch.testing.assert_close(raw(read.eval()), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_gates_train_and_stay_exact_where_the_rest_is_narrow(mesh: DeviceMesh) -> None:
    spec = ResidualGates(mode="full", level="block")
    whole = denoiser()
    apply_gates(whole, spec)
    disturb(whole)
    wanted = torch.autograd.grad(raw(whole).square().mean(), gate_parameters(whole))
    sharded = copy.deepcopy(whole)
    shard(sharded, mesh)
    torch.testing.assert_close(raw(sharded), raw(whole), atol=1e-6, rtol=1e-6)
    raw(sharded).square().mean().backward()
    for parameter, gradient in zip(gate_parameters(sharded), wanted, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, atol=1e-7, rtol=1e-5)
    narrow = copy.deepcopy(whole)
    seen = []
    for _, gate in gates_of(narrow):
        gate.register_forward_hook(lambda gate, *_: seen.append(gate.delta.clone()))
    shard(narrow, mesh, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        raw(narrow).square().mean().backward()
    assert [delta.dtype for delta in seen] == [torch.float32] * 2
    for delta, (_, gate) in zip(seen, gates_of(whole), strict=True):
        assert torch.equal(delta, gate.get_parameter("delta"))
    assert all(parameter.grad is not None for parameter in gate_parameters(narrow))
    with pytest.raises(FewstepError, match="cannot be merged; merge a whole copy"):
        merge_gates(narrow)
