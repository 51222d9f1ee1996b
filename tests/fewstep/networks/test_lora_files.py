"""Adapters in files, here and in diffusers, and merged into weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.lora import LoRA, LoRADenoiser, share_base
from fewstep.networks.lora_files import (
    FILE_NAME,
    load_adapter,
    merge,
    merged_denoiser,
    read_adapter,
    save_adapter,
)
from fewstep.networks.pipelines import LoadedPipeline, load_denoiser_of
from lightning_modules.parallel import shard

from ranks import in_group, run_ranks
from tiny_transformers import SAVES, loaded_by_diffusers
from training_runs import network

OPTIONS = LoRA(rank=4, alpha=6)  # a scale of 1.5, so that a lost alpha shows


@dataclasses.dataclass
class Case:
    """A tiny pipeline, loaded once."""

    ours: LoadedPipeline
    cond: dict[str, Tensor]

    def student(self, seed: int | None = None, lora: LoRA = OPTIONS) -> LoRADenoiser:
        """On a base of its own; with a seed, trained."""
        student = share_base(copy.deepcopy(self.ours.denoiser), lora).student.eval()
        return student if seed is None else randomised(student, seed)

    @torch.no_grad()
    def output(self, denoiser: Denoiser) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        x = torch.randn(2, *denoiser.sample_shape, generator=draws)
        return denoiser.raw(x, torch.tensor([500.0, 900.0]), self.cond)

    def output_of(self, network: Any) -> Tensor:
        """Of a network as diffusers has it."""
        denoiser = copy.deepcopy(self.ours.denoiser)
        denoiser.backbone.network = network.eval()
        return self.output(denoiser)


@torch.no_grad()
def randomised(student: LoRADenoiser, seed: int) -> LoRADenoiser:
    draws = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    return student


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def loaded(name: str) -> Case:
        if name not in made:
            folder = SAVES[name](tmp_path_factory.mktemp(name))
            ours = load_denoiser_of(folder, (16, 16))
            made[name] = Case(ours, ours.text.encode(["a b", "moving c"]))
        return made[name]

    return loaded


BOTH = [("sd", "diffusers"), ("sd", "kohya"), ("sd3", "diffusers")]


@pytest.mark.parametrize(("name", "layout"), BOTH)
def test_a_file_gives_the_same_outputs_here_and_in_diffusers(
    name: str, layout: Any, load: Any, tmp_path: Path
) -> None:
    case = load(name)
    student = case.student(1)
    expected = case.output(student)
    assert (expected - case.output(case.ours.denoiser)).abs().max() > 0.05
    path = save_adapter(student, tmp_path, layout)
    assert path == tmp_path / FILE_NAME

    mine = case.student()
    load_adapter(mine, tmp_path)
    assert torch.equal(case.output(mine), expected)

    pipeline = loaded_by_diffusers(case.ours.folder)
    pipeline.load_lora_weights(tmp_path)
    theirs = getattr(pipeline, case.ours.family.part)
    torch.testing.assert_close(case.output_of(theirs), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_further_families_files_are_read_by_diffusers(name: str, load: Any, tmp_path: Path) -> None:
    test_a_file_gives_the_same_outputs_here_and_in_diffusers(name, "diffusers", load, tmp_path)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_merged_weights_give_the_students_outputs(name: str, load: Any) -> None:
    case = load(name)
    student = case.student(1)
    plain, student.alpha_floor = case.ours.denoiser, 0.25
    merged = merged_denoiser(student)
    assert type(merged) is Denoiser
    assert merged.to_spec() == {**plain.to_spec(), "alpha_floor": 0.25}
    torch.testing.assert_close(case.output(merged), case.output(student), atol=2e-6, rtol=1e-5)
    assert type(merged.backbone) is type(plain.backbone)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    changed = {
        name
        for name, value in merged.state_dict().items()
        if not torch.equal(value, plain.state_dict()[name])
    }
    prefix = "backbone.network."
    assert changed == {f"{prefix}{n}.weight" for n in student.adapter_names}


def test_a_base_in_half_precision_is_merged_in_float32() -> None:
    alone = Denoiser(network(), VPSchedule(), "v_prediction").bfloat16()
    base = {name: value.float() for name, value in alone.backbone.state_dict().items()}
    student = randomised(share_base(alone, OPTIONS).student, 1)
    merged = merge(student).state_dict()
    name = "transformer.transformer_blocks.1.attn1.to_k.weight"
    adapter = student.adapter.get_submodule("transformer_blocks.1.attn1.to_k").state_dict()
    delta = 1.5 * adapter["lora_B.weight"] @ adapter["lora_A.weight"]
    torch.testing.assert_close(merged[name], base[name] + delta)
    assert {value.dtype for value in merged.values()} == {torch.float32}


def merged_shards() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    made = share_base(Denoiser(network(), VPSchedule(), "v_prediction"), OPTIONS)
    randomised(made.student, 1)
    shard(made.teacher, init_device_mesh("cpu", (2,)))
    return merge(made.student).state_dict()


def test_a_sharded_base_is_merged_whole() -> None:
    whole = share_base(Denoiser(network(), VPSchedule(), "v_prediction"), OPTIONS)
    expected = merge(randomised(whole.student, 1)).state_dict()
    for found in run_ranks(2, in_group, merged_shards):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------- what files hold


def own_student(seed: int = 1, **options: Any) -> LoRADenoiser:
    """On a network of this project, which no pipeline has."""
    lora = dataclasses.replace(OPTIONS, **options)
    alone = Denoiser(network(), VPSchedule(), "v_prediction")
    return randomised(share_base(alone, lora).student, seed)


def weights(student: LoRADenoiser) -> list[Tensor]:
    return list(student.state_dict().values())


def test_a_network_of_our_own_has_files_too(tmp_path: Path) -> None:
    saved, other = own_student(1), own_student(2)
    load_adapter(other, save_adapter(saved, tmp_path / "deeper" / "mine.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(weights(saved), weights(other), strict=True))
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["mine.safetensors"]


def test_kohyas_layout_has_its_names_and_alphas(load: Any, tmp_path: Path) -> None:
    student = load("sd").student(1, LoRA(rank=4, alpha=6, target_modules=["attn1.to_out.0"]))
    found = load_file(save_adapter(student, tmp_path, "kohya"))
    first = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert found[f"{first}.alpha"] == 6
    assert found[f"{first}.lora_down.weight"].shape == (4, 8)
    assert found[f"{first}.lora_up.weight"].shape == (8, 4)
    assert len(found) == 3 * len(student.adapter_names)


def test_kohyas_layout_is_for_unets_alone(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="no names for the layers of DiTTransformer2DModel"):
        save_adapter(own_student(), tmp_path, "kohya")
    assert not list(tmp_path.iterdir())


def test_diffusers_layout_says_alpha_where_diffusers_looks(load: Any, tmp_path: Path) -> None:
    path = save_adapter(load("sd").student(1), tmp_path)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (4, 6)
    assert read_adapter(tmp_path).alpha.keys() == {n for n, _ in read_adapter(tmp_path).tensors}


# ---------------------------------------------------------------------- files that do not fit


def test_a_file_of_another_architecture_names_the_layers(load: Any, tmp_path: Path) -> None:
    save_adapter(load("sd").student(1), tmp_path)
    student = own_student()
    before = [value.clone() for value in weights(student)]
    with pytest.raises(FewstepError, match="another architecture") as caught:
        load_adapter(student, tmp_path)
    message = str(caught.value)
    assert "'down_blocks.0.attentions.0.proj_in'" in message
    assert "it lacks 'transformer_blocks.0.attn1.to_k'" in message
    assert all(torch.equal(a, b) for a, b in zip(weights(student), before, strict=True))


def test_a_file_of_a_wider_network_names_the_tensor(tmp_path: Path) -> None:
    wide = Denoiser(DiT(8, 1, num_layers=2, num_heads=2, head_dim=16), VPSchedule(), "v_prediction")
    save_adapter(share_base(wide, OPTIONS).student, tmp_path)
    with pytest.raises(FewstepError, match=r"lora_A of '.*to_q' is \[4, 32\].* and \[4, 16\] here"):
        load_adapter(own_student(), tmp_path)


def test_a_file_for_other_targets_is_refused(tmp_path: Path) -> None:
    save_adapter(own_student(target_modules=["to_q"]), tmp_path)
    with pytest.raises(FewstepError, match=r"it lacks 'transformer_blocks.0.attn1.to_k'"):
        load_adapter(own_student(target_modules=["to_q", "to_k"]), tmp_path)


def test_a_file_that_lacks_half_of_a_layer_is_refused(tmp_path: Path) -> None:
    path = save_adapter(own_student(), tmp_path)
    tensors = load_file(path)
    del tensors["transformer.transformer_blocks.0.attn1.to_k.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(
        FewstepError, match=r"lora_B of 'transformer_blocks.0.attn1.to_k' is missing"
    ):
        load_adapter(own_student(alpha=4), tmp_path)


def test_another_rank_or_alpha_is_named(tmp_path: Path) -> None:
    path = save_adapter(own_student(), tmp_path)
    with pytest.raises(FewstepError, match=r"has rank 4 and this LoRA 8; set lora.rank: 4"):
        load_adapter(own_student(rank=8), tmp_path)
    with pytest.raises(FewstepError, match=r"has alpha 6 and this LoRA 4; set lora.alpha: 6"):
        load_adapter(own_student(alpha=None), tmp_path)
    save_file(load_file(path), path)  # which drops alpha
    with pytest.raises(FewstepError, match=r"has alpha 4 and this LoRA 6; set lora.alpha: 4"):
        load_adapter(own_student(), tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save_adapter(own_student(), tmp_path)
    content = path.read_bytes()
    for length in (0, 4, 500, len(content) - 100):
        path.write_bytes(content[:length])
        with pytest.raises(FewstepError, match=r"Cannot read the adapter file.*truncated"):
            read_adapter(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=f"Cannot read the adapter file '.*{FILE_NAME}'"):
        read_adapter(tmp_path)


def test_a_file_without_a_lora_is_refused(tmp_path: Path) -> None:
    save_file({"some.weight": torch.zeros(2)}, tmp_path / FILE_NAME)
    with pytest.raises(FewstepError, match=r"holds no LoRA that is known here; it has some.weight"):
        read_adapter(tmp_path)


def test_damaged_options_are_refused(tmp_path: Path) -> None:
    path = save_adapter(own_student(), tmp_path)
    save_file(load_file(path), path, {"lora_adapter_metadata": "{"})
    with pytest.raises(FewstepError, match="Cannot read the adapter file"):
        read_adapter(tmp_path)
