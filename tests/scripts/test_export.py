"""``fewstep export``: what it finds, writes and refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep.diffusion import Denoiser, FlowSchedule, Schedule, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.folders import weights_hash
from fewstep.networks.gates import ResidualGates, is_gated, load_gates
from fewstep.networks.loading import read_checkpoint
from fewstep.networks.lora import LoRA
from fewstep.networks.parts import load_part
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules import (
    ConsistencyDistillation,
    PhasedConsistencyDistillation,
)
from scripts.evaluate.pipelines import PipelineSampler
from scripts.export import calls

from tiny_pipelines import image_vae, save_stable_diffusion
from tiny_students import export, save_run, save_student, sd_student
from tiny_transformers import save_dit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(base, tmp_path_factory.mktemp("runs") / "version_0")


# ---------------------------------------------------------------------- what is written


def test_a_run_is_exported_whole_with_what_the_checkpoint_says(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained, "--dest", tmp_path / "out")
    assert "DDIMScheduler, for 4 steps" in capsys.readouterr().out
    made = {p.relative_to(tmp_path / "out").parts[0] for p in (tmp_path / "out").rglob("*")}
    parts = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    files = {"README.md", "fewstep.json", "model_index.json", "pictures"}
    assert made == parts | files
    for path in (base / "vae").iterdir():
        assert path.samefile(tmp_path / "out" / "vae" / path.name)
    state = read_checkpoint(trained / "checkpoints" / "last.ckpt")["state_dict"]
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in written.items():
        torch.testing.assert_close(weight, state[f"ema.backbone.network.{name}"])
    assert not list(tmp_path.glob("*.partial"))


def test_the_card_tells_origin_edges_call_numbers_and_shows_the_newest_picture(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    export(trained, "--dest", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| teacher | {base} (sha256 {weights_hash(base, ['unet'])}) |" in card
    assert "| edges | 0, 249, 499, 749, 999 |" in card
    for said in ("num_inference_steps=4,", "guidance_scale=2.0,", "height=16,", "width=16,"):
        assert said in card
    assert "| frechet_inception | 4 | 2 | 12.35 | 50 | 0 |" in card
    assert "resize: antialiased bicubic" in card
    assert "98.7" not in card
    assert "The licence of the base model applies" in card
    with Image.open(tmp_path / "out" / "pictures" / "4_steps.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (0, 128, 0)


def test_the_student_itself_and_half_precision_can_be_asked_for(
    trained: Path, tmp_path: Path
) -> None:
    export(trained, "--dest", tmp_path / "out", "--role", "student", "--half", "--guidance", "3")
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    state = read_checkpoint(trained / "checkpoints" / "last.ckpt")["state_dict"]
    for name, weight in written.items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, state[f"student.backbone.network.{name}"].half())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | student, float16 |" in card
    assert "guidance_scale=3.0," in card
    assert "Measured" not in card  # the numbers are of the average


def test_weights_beyond_float16_are_not_written_in_it(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.ckpt"
    sd_student(base, path)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["ema.backbone.network.conv_in.bias"][0] = 1e6
    torch.save(content, path)
    with pytest.raises(FewstepError, match=r"'conv_in.bias' leave float16's range"):
        export(path, "--dest", tmp_path / "out", "--half")
    assert not list(tmp_path.glob("out*"))


def test_evaluate_calls_an_export_as_its_card_says(tmp_path: Path) -> None:
    # Stable Diffusion's own pipeline leaves a VAE's shift out, so this one has none.
    base = save_stable_diffusion(tmp_path / "base", image_vae(scaling_factor=0.5))
    loaded = load_denoiser_of(base, (16, 16))
    student = ConsistencyDistillation(
        teacher=partial(getattr, loaded, "denoiser"), sampling_guidance=1.5
    )
    save_student(student, tmp_path / "student.ckpt")
    export(tmp_path / "student.ckpt", "--dest", tmp_path / "out", "--pipeline", base)
    sampler = PipelineSampler(tmp_path / "out", [2])
    assert sampler.guidance_scale() == 1.5
    sources = [torch.Generator().manual_seed(n) for n in (5, 6)]
    found = sampler.sample(torch.zeros(2, 1), None, 2, sources, prompt=["a b", "c"])

    sources = [torch.Generator().manual_seed(n) for n in (5, 6)]
    noise = torch.stack([torch.randn(student.sample_shape, generator=one) for one in sources])
    cond = loaded.text.encode(["a b", "c"])
    x0 = student.sample(noise, cond, 2, sources)
    torch.testing.assert_close(found, loaded.latents.decode(x0).clamp(-1, 1), atol=1e-4, rtol=0)
    with pytest.raises(FewstepError, match=r"exported for \[1, 2, 4, 8\] steps, not for \[3\]"):
        PipelineSampler(tmp_path / "out", [3])


def test_stated_times_replace_a_schedulers_own_only_within_the_call() -> None:
    asked = []

    class Scheduler:
        def set_timesteps(self, steps: int | None = None, device: Any = None, **times: Any) -> None:
            asked.append((steps, times))

    scheduler = Scheduler()
    with calls.visiting(scheduler, {"timesteps": [999, 739]}):
        scheduler.set_timesteps(2, device="cpu")
        assert asked == [(None, {"timesteps": [999, 739]})]
    scheduler.set_timesteps(2)
    assert asked[1:] == [(2, {})]


def test_a_class_conditional_pipeline_draws_what_its_student_draws(tmp_path: Path) -> None:
    base = save_dit(tmp_path / "base")
    loaded = load_denoiser_of(base, (16, 16))
    student = PhasedConsistencyDistillation(
        teacher=partial(getattr, loaded, "denoiser"), num_grid_points=50, sampling_guidance=2.0
    )
    save_student(student, tmp_path / "student.ckpt")
    export(tmp_path / "student.ckpt", "--dest", tmp_path / "out", "--pipeline", base)
    call = calls.read_calls(tmp_path / "out")[4]
    assert call.visit == {"timesteps": [999, 739, 499, 239]}
    sampler = PipelineSampler(tmp_path / "out", [4])
    labels = {"class_labels": torch.tensor([3, 7])}
    found = sampler.sample(torch.zeros(2, 1), labels, 4, [torch.Generator().manual_seed(5)] * 2)

    source = torch.Generator().manual_seed(5)
    noise = torch.cat([torch.randn(1, *student.sample_shape, generator=source) for _ in "ab"])
    ours = loaded.latents.decode(student.sample(noise, labels, 4)).clamp(-1, 1)
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- adapters


@pytest.mark.slow
def test_a_lora_student_is_exported_merged_or_as_an_adapter(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = tmp_path / "student.ckpt"
    student = PhasedConsistencyDistillation(teacher=str(base), num_phases=2, lora=LoRA(rank=2))
    save_student(student, path)
    export(path, "--dest", tmp_path / "merged")
    export(path, "--dest", tmp_path / "adapter", "--adapter")
    assert not (tmp_path / "adapter" / "unet").exists()
    lines = """
import re, sys
for name in ("fewstep", "lightning_modules", "scripts", "lightning"):
    sys.modules[name] = None
import torch
for name in ("merged", "adapter"):
    code = re.findall("```python\\n(.*?)```", open(f"{name}/README.md").read(), re.DOTALL)[0]
    code = code.replace("made = pipe(", "made = pipe(latents=noise, output_type='latent',")
    found = {"noise": torch.load("noise")}
    exec(code.replace("a photo of a cat", "a b"), found)
    torch.save(found["made"], f"{name}.made")
"""
    noise = torch.randn(1, *student.sample_shape)
    torch.save(noise, tmp_path / "noise")
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    cond = load_denoiser_of(base).text.encode(["a b"])
    ours = student.sample(noise, cond, 2)[0]
    unadapted = student.sample(noise, cond, 2, role="teacher")[0]
    assert (ours - unadapted).abs().max() > 1e-2
    for name in ("merged", "adapter"):
        assert (torch.load(tmp_path / f"{name}.made") - ours).abs().max() < 1e-4


# ---------------------------------------------------------------------- gates

AROUND_BLOCKS = ResidualGates(mode="alpha_rho", level="block")


def test_gates_that_are_no_change_of_a_weight_lie_beside_the_network(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, gates in (("beside", AROUND_BLOCKS), ("merged", ResidualGates())):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "student.ckpt"
        student = sd_student(base, path, num_phases=2, gates=gates)
        export(path, "--dest", tmp_path / name / "out")
        beside = name == "beside"
        assert ("without load_gates it is another network" in capsys.readouterr().out) == beside
        card = (tmp_path / name / "out" / "README.md").read_text()
        assert ('load_gates(pipe.unet, "out/unet")' in card) == beside
        unet = load_part(tmp_path / name / "out", "unet")
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 250])
        cond = {"encoder_hidden_states": torch.randn(2, 5, unet.config.cross_attention_dim)}
        assert student.ema is not None
        expected = student.ema.backbone.network(x, t, **cond, return_dict=False)[0]
        if beside:
            without = unet(x, t, **cond, return_dict=False)[0]
            assert (without - expected).norm() / expected.norm() > 1e-3
            load_gates(unet, tmp_path / name / "out" / "unet")
        torch.testing.assert_close(
            unet(x, t, **cond, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5
        )
        with_fewstep = load_denoiser_of(tmp_path / name / "out", (16, 16)).denoiser
        assert is_gated(with_fewstep) == beside


def test_the_cards_lines_for_such_gates_draw_what_the_student_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = save_student(
        ConsistencyDistillation(
            teacher=partial(digit_teacher, VPSchedule(), False), gates=AROUND_BLOCKS
        ),
        tmp_path / "student.ckpt",
    )
    export(tmp_path / "student.ckpt", "--dest", tmp_path / "out", "--steps", "2")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10, 1, 8, 8, generator=generator)
    labels = {"class_labels": torch.arange(10)}
    ours = student.decode(student.sample(noise, labels, 2, generator))
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.findall("```python\n(.*?)```", card, re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(code.replace('"out', f'"{tmp_path}/out'), found)
    torch.testing.assert_close(found["images"], ours, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- digits

DIGITS: dict[str, tuple[type[ConsistencyDistillation], Schedule, dict[str, Any], list[int]]] = {
    "cm": (ConsistencyDistillation, VPSchedule(), {}, [1, 2, 4]),
    "cm_guided": (ConsistencyDistillation, FlowSchedule(2.0), {"sampling_guidance": 2.0}, [2]),
    "pcm": (PhasedConsistencyDistillation, VPSchedule(), {"num_phases": 8}, [8]),
    "pcm_guided": (
        PhasedConsistencyDistillation,
        VPSchedule(trajectory_end="clean"),
        {"num_grid_points": 50, "sampling_guidance": 2.0},
        [4],
    ),
}


TELL_VARIANCES = ("cm", "pcm_guided")


def digit_teacher(schedule: Schedule, told: bool) -> Denoiser:
    prediction: Any = "flow_prediction" if isinstance(schedule, FlowSchedule) else "v_prediction"
    network = DiT(8, 1, num_layers=2, num_heads=2, head_dim=8, learned_variance=told)
    return Denoiser(network, schedule, prediction)


@pytest.mark.slow
def test_the_cards_lines_for_digits_draw_what_the_student_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = {}
    for name, (method, schedule, options, steps) in DIGITS.items():
        teacher = partial(digit_teacher, schedule, name in TELL_VARIANCES)
        made = method(teacher=teacher, **options)
        student = save_student(made, tmp_path / f"{name}.ckpt")
        export(tmp_path / f"{name}.ckpt", "--dest", tmp_path / name, "--steps", *steps)
        for k in steps:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(10, 1, 8, 8, generator=generator)
            labels = {"class_labels": torch.arange(10)}
            ours[name, k] = student.decode(student.sample(noise, labels, k, generator))
    lines = """
import re, sys
from pathlib import Path
for name in ("fewstep", "lightning_modules", "scripts", "lightning"):
    sys.modules[name] = None
import torch
for card in Path(".").glob("*/README.md"):
    for number, code in enumerate(re.findall("```python\\n(.*?)```", card.read_text(), re.DOTALL)):
        found = {}
        exec(code, found)
        torch.save(found["images"], f"{card.parent}.{number}")
"""
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    for (name, k), images in ours.items():
        theirs = torch.load(tmp_path / f"{name}.{DIGITS[name][3].index(k)}")
        assert images.std() > 0.05
        difference = float((theirs - images).abs().max())
        print(f"{name} {k}: {difference:.1e}")
        assert difference < 1e-4, (name, k)
    card = (tmp_path / "pcm" / "README.md").read_text()
    assert len(re.findall("```python\n(.*?)```", card, re.DOTALL)[0].splitlines()) <= 16
    with pytest.raises(FewstepError, match="belongs to no pipeline"):
        export(tmp_path / "cm.ckpt", "--dest", tmp_path / "x", "--pipeline", tmp_path)
