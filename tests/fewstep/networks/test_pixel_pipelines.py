"""Pipelines without VAE and text, against diffusers' own sampling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from fewstep.diffusion.denoiser import Guided
from fewstep.diffusion.samplers import ode_sample
from fewstep.errors import FewstepError
from fewstep.guidance import HiddenBox, LinearMeasurement, mpgd
from fewstep.networks.gates import ResidualGates, is_gated
from fewstep.networks.latents import LatentCodec
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules import (
    ConsistencyDistillation,
    PhasedConsistencyDistillation,
    Steering,
    TrainingFreeGuidance,
)
from scripts.export.exporting import export
from scripts.export.students import Request
from scripts.gates.folders import apply, merge

from tiny_students import save_student

HIDDEN = HiddenBox(0, 8, 16, 8)


def network(**config: object) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **config,
    ).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As released, but that nothing is clipped in sampling."""
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    DDPMPipeline(network(), scheduler).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_its_ode_is_that_of_diffusers_pipeline(folder: Path) -> None:
    pipe = DDIMPipeline(network(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(2, torch.Generator().manual_seed(1), num_inference_steps=10, output_type="np")
    loaded = load_denoiser_of(folder)
    assert loaded.denoiser.sample_shape == (3, 16, 16)
    assert loaded.size == (16, 16)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([*pipe.scheduler.timesteps.tolist(), loaded.denoiser.schedule.t_clean])
    ours = ode_sample(loaded.denoiser, noise, None, times.double())
    as_pictures = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert as_pictures.std() > 0.05
    torch.testing.assert_close(as_pictures, torch.from_numpy(theirs.images), atol=1e-5, rtol=0)


def test_repositories_without_folders_are_the_same_network(folder: Path) -> None:
    flat = folder.with_name("flat")
    flat.mkdir()
    shutil.copy(folder / "model_index.json", flat)
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            shutil.copy(path, flat)
    ours, theirs = load_denoiser_of(flat), load_denoiser_of(folder)
    for one, other in zip(ours.denoiser.parameters(), theirs.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)
    assert ours.sha256
    apply(flat, ResidualGates(mode="alpha"))
    assert is_gated(load_denoiser_of(flat).denoiser.backbone)
    merge(flat, folder.with_name("merged"))
    for where in (flat, folder.with_name("merged")):
        DDPMPipeline.from_pretrained(where)
    (flat / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FewstepError, match="Cannot read the weights"):
        load_denoiser_of(flat)


def test_what_it_cannot_be_told_is_said(folder: Path, tmp_path: Path) -> None:
    noise, t = torch.randn(2, 3, 16, 16), torch.full((2,), 500.0)
    labels = {"class_labels": torch.tensor([1, 2])}
    plain = load_denoiser_of(folder).denoiser
    with pytest.raises(FewstepError, match="has no classes"):
        plain(noise, t, labels)
    assert plain.backbone.null_cond(labels) == {}
    of_classes = DDPMPipeline(network(num_class_embeds=10), DDPMScheduler())
    of_classes.save_pretrained(tmp_path / "classes")
    told = load_denoiser_of(tmp_path / "classes").denoiser
    with pytest.raises(FewstepError, match="needs class labels"):
        told(noise, t)
    with pytest.raises(FewstepError, match="none that means 'no class'"):
        Guided(told, 2.0)(noise, t, labels)
    others = {"class_labels": torch.tensor([3, 4])}
    assert not torch.equal(told.backbone(noise, t, **labels), told.backbone(noise, t, **others))
    with pytest.raises(FewstepError, match="has no VAE"):
        LatentCodec(folder)


def test_it_is_guided_in_pixels_without_any_vae(tmp_path: Path) -> None:
    DDPMPipeline(network(), DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    energy = LinearMeasurement(HIDDEN)
    module = TrainingFreeGuidance(str(tmp_path), Steering(mpgd(energy, 0.3), "whole", True))
    module.configure_model()
    assert module.companions is None
    assert module.sample_shape == (3, 16, 16)
    whole = torch.full((2, 3, 16, 16), 0.4)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    samples = module.sample(noise, {"whole": whole}, 10)
    plain = ode_sample(module.student, noise, None, module.student.schedule.spaced_times(10))
    assert HIDDEN(samples - whole).norm() < 0.8 * HIDDEN(plain - whole).norm()


def test_students_go_back_into_their_pipeline(folder: Path, tmp_path: Path) -> None:
    module = PhasedConsistencyDistillation(str(folder), num_phases=4, num_grid_points=20)
    save_student(module, tmp_path / "student.ckpt")
    exported = tmp_path / "exported"
    export(Request(tmp_path / "student.ckpt", exported))
    assert "class_labels" not in (exported / "README.md").read_text()
    pipe = DDPMPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(2, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np")
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = module.sample(noise, None, 4)
    as_pictures = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(as_pictures, torch.from_numpy(theirs.images), atol=1e-4, rtol=0)


def test_a_pipeline_that_swaps_the_scheduler_takes_no_student_with_another(
    folder: Path, tmp_path: Path
) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDIMPipeline"}))
    module = ConsistencyDistillation(str(folder), num_grid_points=20)
    save_student(module, tmp_path / "student.ckpt")
    with pytest.raises(FewstepError, match="puts its own scheduler in that one's place"):
        export(Request(tmp_path / "student.ckpt", tmp_path / "exported"))
