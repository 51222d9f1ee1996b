"""What ``fewstep plan`` says of the host's memory, against roles and encoders that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datamodules import Digits
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks import DiT
from fewstep.networks.lora import LoRA
from fewstep.networks.text import TextEncoding
from lightning_modules import ConsistencyDistillation, Pretrained
from scripts.plan import as_dict, format_plan, plan_of
from scripts.plan.host import host_memory, text_parameters
from scripts.plan.roles import build_without_weights
from scripts.plan.table import size_text

from tiny_pipelines import save_stable_diffusion

pytestmark = pytest.mark.threads


def teacher() -> Denoiser:
    return Denoiser(DiT(8, 1, num_layers=2, num_heads=2, head_dim=8), VPSchedule(), "v_prediction")


def bytes_of(module: nn.Module) -> int:
    """Of all memory that a module's tensors hold, each once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"lora": LoRA(rank=2), "ema_decay": 0.9}])
def test_a_node_holds_all_roles_of_all_its_ranks_in_float32(options: dict[str, Any]) -> None:
    real = ConsistencyDistillation(teacher, 20, **options)
    real.configure_model()
    module = ConsistencyDistillation(teacher, 20, frozen_precision="bfloat16", **options)
    plan = plan_of(module, Digits(), 16, "fsdp2")
    assert plan.host.ranks == 8
    assert plan.host.building == 8 * bytes_of(real)
    assert plan.host.text is None
    written = format_plan(plan)
    assert "a node (8 ranks" in written
    assert size_text(plan.host.building) in written
    assert as_dict(plan)["host"]["building"] == plan.host.building


@pytest.mark.parametrize(("devices", "a_node", "ranks"), [(1, 8, 1), (2, 8, 2), (8, 4, 4)])
def test_a_node_has_no_more_ranks_than_devices(devices: int, a_node: int, ranks: int) -> None:
    plan = plan_of(ConsistencyDistillation(teacher, 20), Digits(), devices, devices_per_node=a_node)
    assert plan.host.ranks == ranks


def test_text_encoders_are_counted_by_their_files_headers(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    encoder = TextEncoding(folder, dtype=torch.float16).pipeline.text_encoder
    expected = sum(parameter.nbytes for parameter in encoder.parameters())
    source = Pretrained(str(folder), (16, 16))
    module = ConsistencyDistillation(source, 20, encoder_precision="float16")
    build_without_weights(module)
    host = host_memory(module, 2)
    assert host.text == 2 * expected
    plan = plan_of(ConsistencyDistillation(teacher, 20), Digits())
    assert "text encoders" not in format_plan(plan)
    assert "text encoders" in format_plan(replace(plan, host=host))


def test_weights_that_are_there_twice_are_counted_once(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    once, part = text_parameters(folder), folder / "text_encoder"
    (part / "model.fp16.safetensors").write_bytes((part / "model.safetensors").read_bytes())
    assert text_parameters(folder) == once
    (part / "model.safetensors").write_bytes(b"cut short")
    assert text_parameters(folder) is None
    for file in part.glob("*.safetensors"):
        file.unlink()
    assert text_parameters(folder) is None
