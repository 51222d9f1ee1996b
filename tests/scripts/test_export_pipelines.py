"""Exported students, sampled by diffusers alone in another process, as their cards say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, TextToVideoSDPipeline
from torch import Tensor

from fewstep.diffusion import samplers
from fewstep.errors import FewstepError
from fewstep.networks.families.flux import packed
from fewstep.networks.lora import LoRA
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules import (
    ConsistencyDistillation,
    MotionConsistencyDistillation,
    PhasedConsistencyDistillation,
    Pretrained,
)
from scripts.export.exporting import export
from scripts.export.students import Request

from tiny_pipelines import (
    save_stable_diffusion,
    save_stable_diffusion_xl,
    save_text_to_video,
    scheduler,
    unet,
)
from tiny_students import save_student
from tiny_transformers import save_flux, save_ltx, save_pixart, save_sd3, save_wan
from training_runs import adversary

PROMPT = "a b"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A student, and the scheduler that its export should have."""

    save: Callable[[Path], Path]
    method: type[ConsistencyDistillation]
    scheduler: str
    steps: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    frames: int | None = None
    adapter: bool = False


def phased(
    save: Callable[[Path], Path],
    scheduler: str,
    phases: int,
    grid: int = 40,
    guidance: float = 1.0,
    frames: int | None = None,
) -> Case:
    options = {"num_phases": phases, "num_grid_points": grid, "sampling_guidance": guidance}
    return Case(save, PhasedConsistencyDistillation, scheduler, [phases], options, frames)


def consistent(
    save: Callable[[Path], Path],
    scheduler: str,
    frames: int | None = None,
    **options: Any,
) -> Case:
    return Case(save, ConsistencyDistillation, scheduler, [1, 2, 4], options, frames)


def moving(
    save: Callable[[Path], Path], scheduler: str, adapter: bool = False, **options: Any
) -> Case:
    """Trained by MCM as its experiments are, without an average."""
    given = {"ema_decay": None, "adversary": adversary(condition=None), **options}
    return Case(save, MotionConsistencyDistillation, scheduler, [1, 4], given, 2, adapter)


SD = save_stable_diffusion
SD_V = partial(SD, scheduling=scheduler(prediction_type="v_prediction", set_alpha_to_one=True))
MODELSCOPE = partial(save_text_to_video, kind=TextToVideoSDPipeline)
ANIMATEDIFF = partial(save_text_to_video, kind=AnimateDiffPipeline)


def save_told_guidance(folder: Path) -> Path:
    """A Stable Diffusion whose network takes a guidance scale as input."""
    save_stable_diffusion(folder)
    unet(time_cond_proj_dim=8).save_pretrained(folder / "unet")
    return folder


def ltx_tokens(latents: Tensor) -> Tensor:
    """Latents ``(B, C, F, H, W)`` as tokens ``(B, F H W, C)``."""
    return latents.flatten(2).transpose(1, 2)


CASES = {
    "sd_pcm_4": phased(SD, "DDIMScheduler", 4),
    "sd_pcm_4_guided_other_edges": phased(SD, "TCDScheduler", 4, grid=50, guidance=2.5),
    "sd_pcm_8_guided": phased(SD, "DDIMScheduler", 8, guidance=2.5),
    "sd_pcm_1": phased(SD, "DDIMScheduler", 1),
    "sd_cm_guided": consistent(SD, "TCDScheduler", sampling_guidance=1.5),
    "sd_cm": consistent(SD, "TCDScheduler"),
    "sd_lcm": consistent(SD, "LCMScheduler", boundary="lcm"),
    "sd_v_pcm_8_other_edges": phased(SD_V, "DPMSolverMultistepScheduler", 8, grid=50),
    "sd_v_cm_guided": consistent(SD_V, "LCMScheduler", sampling_guidance=2.0),
    "sdxl_pcm_2_guided": phased(save_stable_diffusion_xl, "DDIMScheduler", 2, guidance=3.0),
    "sd3_pcm_4_guided": phased(save_sd3, "FlowMapEulerDiscreteScheduler", 4, guidance=1.5),
    "sd3_pcm_4_other_edges": phased(save_sd3, "FlowMatchEulerDiscreteScheduler", 4, grid=50),
    "sd3_cm_guided": consistent(save_sd3, "FlowMatchLCMScheduler", sampling_guidance=1.5),
    "flux_pcm_2_guided": phased(save_flux, "FlowMatchEulerDiscreteScheduler", 2, guidance=1.5),
    "modelscope_pcm_4_other_edges": phased(
        MODELSCOPE, "TCDScheduler", 4, grid=50, guidance=2.0, frames=2
    ),
    "modelscope_cm": consistent(MODELSCOPE, "TCDScheduler", frames=2),
    "animatediff_pcm_2_guided": phased(ANIMATEDIFF, "DDIMScheduler", 2, guidance=2.0, frames=2),
    "wan_pcm_4_guided": phased(
        save_wan, "FlowMapEulerDiscreteScheduler", 4, guidance=2.0, frames=5
    ),
    "wan_cm": consistent(save_wan, "FlowMatchLCMScheduler", frames=5),
    "ltx_pcm_4_other_edges": phased(
        save_ltx, "FlowMatchEulerDiscreteScheduler", 4, grid=50, guidance=2.0, frames=9
    ),
    "pixart_pcm_2_guided": phased(save_pixart, "DDIMScheduler", 2, guidance=2.0),
    "modelscope_mcm": moving(MODELSCOPE, "LCMScheduler", boundary="lcm"),
    "modelscope_mcm_merged": moving(MODELSCOPE, "TCDScheduler", lora=LoRA(rank=2)),
    "animatediff_mcm": moving(ANIMATEDIFF, "TCDScheduler"),
    "animatediff_mcm_merged": moving(
        ANIMATEDIFF, "LCMScheduler", boundary="lcm", lora=LoRA(rank=2)
    ),
    "animatediff_mcm_adapter": moving(
        ANIMATEDIFF, "LCMScheduler", True, boundary="lcm", lora=LoRA(rank=2, alpha=2)
    ),
    "sd_told_guidance": consistent(
        save_told_guidance, "TCDScheduler", guidance_embedding=True, guidance_range=(2.0, 5.0)
    ),
    "sd_newly_told_guidance": consistent(
        SD, "TCDScheduler", guidance_embedding=True, guidance_range=(2.0, 5.0)
    ),
    "sdxl_newly_told_guidance": consistent(
        save_stable_diffusion_xl, "TCDScheduler", guidance_embedding=True, guidance_range=(2.0, 8.0)
    ),
}
LAYOUTS: dict[Any, Callable[[Tensor], Tensor]] = {save_flux: packed, save_ltx: ltx_tokens}
"""What these pipelines make of latents, where they are not plain."""
QUICK = ("sd_cm_guided",)
"""Always tested; the rest takes longer."""


def marks(name: str) -> Any:
    return () if name in QUICK else pytest.mark.slow


ASKED = [
    pytest.param(name, steps, marks=marks(name))
    for name, case in CASES.items()
    for steps in case.steps
]

# Runs each card's own lines from given latents; any import of this project fails.
DIFFUSERS_ALONE = """
import re, sys
from pathlib import Path
for name in ("fewstep", "lightning_modules", "scripts", "callbacks", "datamodules", "lightning"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
for card in sorted(Path(".").glob("*/README.md")):
    noise = torch.load(f"{card.parent}.noise")
    for code in re.findall("```python\\n(.*?)```", card.read_text(), re.DOTALL):
        steps = re.search("num_inference_steps=(\\d+)", code)[1]
        code = code.replace("made = pipe(", "made = pipe(latents=noise, output_type='latent',")
        code = code.replace("a photo of a cat", PROMPT)
        found = {"noise": noise.clone()}
        exec(code, found)
        torch.save(found["made"], f"{card.parent}.{steps}")
"""


@dataclass(frozen=True)
class Made:
    """Folder of exports and what this project's own sampler made, by case and step count."""

    folder: Path
    schedulers: dict[str, str]
    ours: dict[tuple[str, int], Tensor]


def frame_by_frame(like: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh noise in the order in which ModelScope's pipeline draws it: frames before channels."""
    batch, channels, frames, *plane = like.shape
    drawn = torch.randn(batch * frames, channels, *plane, generator=generator)
    return drawn.view(batch, frames, channels, *plane).transpose(1, 2)


def make(name: str, made: Made) -> None:
    """Exports a student and samples with it here."""
    case, folder = CASES[name], made.folder
    base = case.save(folder / f"{name}.base")
    size = (32, 32) if case.save is save_ltx else (16, 16)  # the least it takes
    loaded = load_denoiser_of(base, size, case.frames)
    teacher: Any = partial(getattr, loaded, "denoiser")
    if "lora" in case.options:  # whose checkpoint has no more than the name of its base
        teacher = Pretrained(str(base), size, case.frames)
    module = case.method(teacher=teacher, **case.options)
    path = folder / f"{name}.ckpt"
    save_student(module, path)
    exported = export(
        Request(path, folder / name, pipeline=base, steps=case.steps, adapter=case.adapter)
    )
    made.schedulers[name] = exported.scheduler
    noise = torch.randn(1, *module.sample_shape, generator=torch.Generator().manual_seed(3))
    layout = LAYOUTS.get(case.save, torch.clone)
    torch.save(layout(noise), folder / f"{name}.noise")
    cond = loaded.text.encode([PROMPT], size)
    for steps in case.steps:
        with pytest.MonkeyPatch.context() as patch:
            if case.save is MODELSCOPE:
                patch.setattr(samplers, "normal_like", frame_by_frame)
            x0 = module.sample(noise, cond, steps, torch.Generator().manual_seed(0))
        made.ours[name, steps] = layout(x0)


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A case's export, made together with its like and sampled by diffusers alone."""

    @cache
    def made(quick: bool) -> Made:
        found = Made(tmp_path_factory.mktemp("exports"), {}, {})
        for name in CASES:
            if (name in QUICK) == quick:
                make(name, found)
        lines = DIFFUSERS_ALONE.replace("PROMPT", repr(PROMPT))
        subprocess.run([sys.executable, "-c", lines], cwd=found.folder, check=True)
        return found

    return lambda name: made(name in QUICK)


@pytest.mark.parametrize(("name", "steps"), ASKED)
def test_diffusers_alone_makes_the_same_samples(
    name: str, steps: int, made_of: Callable[[str], Made]
) -> None:
    made = made_of(name)
    ours = made.ours[name, steps][0]
    theirs = torch.load(made.folder / f"{name}.{steps}")
    assert ours.std() > 0.05
    assert theirs.shape == ours.shape
    difference = float((theirs - ours).abs().max())
    print(f"{name} {steps}: {difference:.1e} of {float(ours.abs().max()):.1f}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_the_scheduler_is_the_plainest_that_fits(name: str, made_of: Callable[[str], Made]) -> None:
    assert made_of(name).schedulers[name] == CASES[name].scheduler


@pytest.mark.slow
def test_times_stand_in_the_call_only_where_no_scheduler_finds_them(
    made_of: Callable[[str], Made],
) -> None:
    def says(name: str, pattern: str) -> bool:
        return bool(re.search(pattern, (made_of(name).folder / name / "README.md").read_text()))

    assert says("sd_pcm_4_guided_other_edges", r"timesteps=\[999, 739, 499, 239\]")
    assert says("sd3_pcm_4_other_edges", r"sigmas=\[1.0, 0.74, 0.5, 0.24\]")
    assert says("modelscope_pcm_4_other_edges", r"set_timesteps\(device=device, timesteps=")
    assert says("ltx_pcm_4_other_edges", r"set_timesteps\(device=device, sigmas=")
    assert says("sd_told_guidance", r"guidance_scale=3.5,")
    for name in ("sd_pcm_4", "sd_pcm_8_guided", "sd_cm", "sd_lcm", "sd3_pcm_4_guided"):
        assert not says(name, r"(timesteps|sigmas)=\[")


@pytest.mark.slow
def test_a_card_names_the_method_and_all_that_it_was_trained_with(
    made_of: Callable[[str], Made],
) -> None:
    card = (made_of("modelscope_mcm").folder / "modelscope_mcm" / "README.md").read_text()
    assert "| method | MotionConsistencyDistillation |" in card
    assert "| features | random convolutions" in card


def test_an_adapter_that_diffusers_could_not_read_is_refused(tmp_path: Path) -> None:
    base = MODELSCOPE(tmp_path / "base")
    teacher = Pretrained(str(base), (16, 16), 2)
    module = MotionConsistencyDistillation(teacher=teacher, lora=LoRA(rank=2), ema_decay=None)
    save_student(module, tmp_path / "student.ckpt")
    with pytest.raises(FewstepError, match=r"no adapters for a UNet3DConditionModel.*merged"):
        export(Request(tmp_path / "student.ckpt", tmp_path / "out", adapter=True))
    assert not (tmp_path / "out").exists()
