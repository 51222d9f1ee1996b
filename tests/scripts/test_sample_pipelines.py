"""``fewstep sample --pipeline``: an export draws, from the same noise, what its run draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep.errors import FewstepError
from fewstep.networks.lora import LoRA
from fewstep.networks.pipelines import load_denoiser_of
from fewstep.seeding import torch_generator
from lightning_modules import (
    ConsistencyDistillation,
    PhasedConsistencyDistillation,
    Pretrained,
)
from scripts.evaluate import DrawnPipeline
from scripts.main import run

from tiny_experiments import two_updates, write_shard
from tiny_pipelines import image_vae, save_stable_diffusion, save_stable_diffusion_xl, unet
from tiny_students import export, save_student
from tiny_transformers import save_dit, save_flux, save_ltx, save_sd3, save_wan


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unshifted(folder: Path) -> Path:
    # Stable Diffusion's own pipeline leaves a VAE's shift out, so this one has none.
    return save_stable_diffusion(folder, image_vae(scaling_factor=0.5))


def experiment(base: Path) -> str:
    """A student for the command line: two updates on captioned pictures, in float32."""
    for part in ("train", "val"):
        write_shard(base.parent / "data" / f"{part}-000000.tar", None)
    config: dict[str, Any] = {
        "trainer": {"precision": "32-true", "logger": False, **two_updates()},
        "model": {
            "class_path": "lightning_modules.ConsistencyDistillation",
            "init_args": {
                "teacher": {
                    "class_path": "lightning_modules.Pretrained",
                    "init_args": {"folder": str(base), "size": [16, 16]},
                },
                "sampling_guidance": 1.5,
            },
        },
        "data": {
            "class_path": "datamodules.Shards",
            "init_args": {
                "shards": "data/train-*.tar",
                "val_shards": "data/val-*.tar",
                "batch_size": 2,
                "sample": {"class_path": "datamodules.fields.Images", "init_args": {"size": 16}},
                "conditions": {"prompt": {"class_path": "datamodules.fields.Caption"}},
            },
        },
    }
    Path("student.yaml").write_text(yaml.safe_dump(config))
    return "student.yaml"


def drawn(folder: str, name: str) -> Any:
    return np.asarray(Image.open(Path(folder) / "samples" / name)).astype(int)


@pytest.mark.slow
def test_an_exports_pictures_are_those_of_its_run(here: Path) -> None:
    config = experiment(unshifted(here / "base"))
    run(["fit", "-c", config])
    run(["sample", "-c", config, "--count", "4", "--steps", "1", "2"])
    export("runs/student", "--dest", "out", "--steps", "1", "2")
    run(["sample", "-c", config, "--count", "4", "--pipeline", "out"])
    for steps in (1, 2):
        ours = drawn("runs/student/version_0", f"00000002_ema_{steps}_steps.png")
        theirs = drawn("runs/samples/out/version_0", f"00000000_pipeline_{steps}_steps.png")
        assert ours.std() > 1
        assert ours.shape == theirs.shape
        assert abs(ours - theirs).max() <= 1
    with pytest.raises(FewstepError, match=r"exported for \[1, 2\] steps, not for \[3\]"):
        run(["sample", "-c", config, "--pipeline", "out", "--steps", "3"])
    with pytest.raises(FewstepError, match=r"no model_index\.json"):
        run(["sample", "-c", config, "--pipeline", "data"])


CASES: dict[str, tuple[Callable[[Path], Path], Any, int, int | None]] = {
    "sd3": (save_sd3, ConsistencyDistillation, 16, None),
    "sdxl": (save_stable_diffusion_xl, PhasedConsistencyDistillation, 16, None),
    "flux": (save_flux, PhasedConsistencyDistillation, 16, None),
    "wan": (save_wan, ConsistencyDistillation, 16, 5),
    "ltx": (save_ltx, PhasedConsistencyDistillation, 32, 9),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "sd3" else pytest.mark.slow) for name in CASES],
)
def test_a_pipeline_of_every_layout_starts_from_the_noise_it_is_given(
    here: Path, name: str
) -> None:
    save, method, side, frames = CASES[name]
    base = save(here / "base")
    loaded = load_denoiser_of(base, (side, side), frames)
    options = {"num_phases": 2} if method is PhasedConsistencyDistillation else {}
    student = method(teacher=partial(getattr, loaded, "denoiser"), **options)
    save_student(student, here / "student.ckpt")
    export("student.ckpt", "--dest", "out", "--pipeline", base, "--steps", "2")
    sampler = DrawnPipeline(here / "out", [2])
    assert sampler.sample_shape == student.sample_shape
    prompts = ["a b", "c"]
    noise = torch.randn(2, *student.sample_shape)
    drawing = [[torch_generator(0, "test", n) for n in range(2)] for _ in "ab"]
    cond = loaded.text.encode(prompts)
    ours = loaded.latents.decode(student.sample(noise, cond, 2, drawing[0]))
    theirs = sampler.sample(noise, None, 2, drawing[1], prompt=prompts)
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours.clamp(-1, 1), atol=2e-4, rtol=0)


def test_a_pipeline_that_takes_no_noise_is_refused(here: Path) -> None:
    with pytest.raises(FewstepError, match="draws its noise itself"):
        DrawnPipeline(save_dit(here / "base"), [2])


# ---------------------------------------------------------------------- LoRAs


def told_lora(base: Path, path: Path) -> Any:
    """A LoRA student that is told its guidance scale, on a pipeline that has no such input."""
    pytest.importorskip("peft")
    module = ConsistencyDistillation(
        Pretrained(str(base), (16, 16)),
        guidance_range=(2.0, 5.0),
        guidance_embedding=True,
        lora=LoRA(rank=4),
    )
    return save_student(module, path)


def check_export(folder: Path, base: Path, student: Any) -> None:
    noise = torch.randn(2, *student.sample_shape)
    drawing = [[torch_generator(0, "test", n) for n in range(2)] for _ in "ab"]
    loaded, prompts = load_denoiser_of(base, (16, 16)), ["a b", "c"]
    ours = student.sample(noise, loaded.text.encode(prompts), 2, drawing[0])
    theirs = DrawnPipeline(folder, [2]).sample(noise, None, 2, drawing[1], prompt=prompts)
    pixels = loaded.latents.decode(ours).clamp(-1, 1)
    torch.testing.assert_close(theirs, pixels, atol=1e-4, rtol=0)


def test_a_lora_that_learnt_a_guidance_input_is_exported_merged(here: Path) -> None:
    base = unshifted(here / "base")
    student = told_lora(base, here / "student.ckpt")
    export("student.ckpt", "--dest", "out", "--steps", "2")
    sampler = DrawnPipeline(here / "out", [2])
    assert sampler.guidance_scale() == 3.5
    assert sampler._pipeline.unet.config.time_cond_proj_dim == 256
    assert sampler._pipeline.unet.time_embedding.cond_proj.weight.any()
    check_export(here / "out", base, student)
    with pytest.raises(FewstepError, match="leave --adapter out to export the merged network"):
        export("student.ckpt", "--dest", "adapter", "--adapter")


def test_a_lora_is_exported_from_a_base_that_has_moved_and_from_no_other(here: Path) -> None:
    base = unshifted(here / "base")
    student = told_lora(base, here / "student.ckpt")
    base.rename(here / "elsewhere")
    with pytest.raises(FewstepError, match=r"cannot be read.*--base FOLDER"):
        export("student.ckpt", "--dest", "out", "--steps", "2")
    export("student.ckpt", "--dest", "out", "--steps", "2", "--base", "elsewhere")
    check_export(here / "out", here / "elsewhere", student)
    other = save_stable_diffusion(here / "other")
    unet(time_embedding_dim=32).save_pretrained(other / "unet")
    with pytest.raises(FewstepError, match="is another base, or has changed"):
        export("student.ckpt", "--dest", "wrong", "--base", "other")
    assert not list(here.glob("wrong*"))
