from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fewstep.diffusion import Guided
from fewstep.errors import FewstepError
from fewstep.guidance import (
    Capped,
    Decoded,
    DiffAugment,
    EachFrame,
    Energy,
    FreeDoMCfg,
    Guidance,
    Normalised,
    Polyak,
    Recurrence,
    Scheduled,
    Target,
    Window,
    guide,
    guided_sample,
)
from fewstep.guidance.levels import SchedulerSteps
from fewstep.networks.latents import LatentCodec
from fewstep.networks.pipelines import load_denoiser_of

from tiny_transformers import SAVES, loaded_by_diffusers

PROMPTS = ["a cat", "dogs"]


@dataclass(frozen=True)
class Near(Energy):
    """Mean squared distance from a colour, or from a sample."""

    colour: float | None = None

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        wanted = target if self.colour is None else self.colour
        return (x0 - wanted).square().flatten(1).mean(1)


SCORE = Scheduled(40.0, "score")
DARK = Guidance(Near(-1.0), SCORE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = SAVES[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def pipeline(folders: Any) -> Any:
    def load(name: str) -> Any:
        pipe = loaded_by_diffusers(folders(name))
        if name == "ltx":  # whose times are otherwise all but 1000 for samples as small as these
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


SMALL = {"height": 16, "width": 16}
CALLS: dict[str, dict[str, Any]] = {
    "sd": {**SMALL, "guidance_scale": 4.0},
    "sd2-v": {**SMALL, "guidance_scale": 4.0},
    "sdxl": {**SMALL, "guidance_scale": 4.0},
    "sd3": {**SMALL, "guidance_scale": 4.0},
    "flux": SMALL,
    "wan": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 4.0},
    "modelscope": {**SMALL, "num_frames": 2, "guidance_scale": 4.0},
    "ltx": {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0},
    "animatediff": {**SMALL, "num_frames": 2, "guidance_scale": 4.0},
}
VIDEOS = ("wan", "modelscope", "ltx", "animatediff")


def run(pipe: Any, name: str, steps: int = 4, **options: Any) -> Tensor:
    """Latents of two samples."""
    draws = [torch.Generator().manual_seed(row) for row in range(2)]
    call = {**CALLS[name], "num_inference_steps": steps, "generator": draws, **options}
    call.setdefault("prompt", PROMPTS)
    made = pipe(output_type="latent", **call)
    found: Tensor = made.frames if name in VIDEOS else made.images
    return found


def told(name: str) -> dict[str, float]:
    """What guide() has to be told of a pipeline."""
    return {"guidance_scale": 4.0} if name == "modelscope" else {}


LATE = Window(high=999)
IDLE = Guidance(Near(-1.0), Scheduled(0.0, "score"), window=LATE)


HEAVY = ("animatediff", "ltx", "modelscope")
EVERY = [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else ()) for n in sorted(CALLS)]


@pytest.mark.parametrize("name", EVERY)
def test_without_strength_a_pipeline_is_as_it_was_to_the_bit(pipeline: Any, name: str) -> None:
    pipe = pipeline(name)
    before = run(pipe, name)
    with guide(pipe, IDLE, **told(name)) as guided:
        found = run(pipe, name)
    if name == "modelscope":  # torch's own 3D convolutions differ where gradients are on
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(found, before)
    assert guided.trace.costs.energy_evaluations > 0
    assert bool((guided.trace.gradient_norm > 0).all())
    assert torch.equal(run(pipe, name), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_loss_of_the_decoded_sample_falls(pipeline: Any, name: str) -> None:
    pipe, losses = pipeline(name), []
    for guidance in (IDLE, Guidance(Near(-1.0), Capped(Normalised(1.0), 0.1), window=LATE)):
        with guide(pipe, guidance, **told(name)) as guided:
            run(pipe, name, steps=6)
        losses.append(guided.trace.loss[-1])
        assert bool(guided.trace.finished.all())
    assert bool((losses[1] < losses[0]).all())


def of_pixels(kind: Any, scheduler: Any) -> Any:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return kind(network, scheduler)


OTHER_CALLS: dict[str, tuple[Any, dict[str, Any], dict[str, float]]] = {
    "ddpm": (lambda _: of_pixels(DDPMPipeline, DDPMScheduler(clip_sample=False)), {}, {}),
    "ddim": (lambda _: of_pixels(DDIMPipeline, DDIMScheduler(clip_sample=False)), {}, {}),
    "dit": (
        lambda load: load("dit"),
        {"class_labels": [3, 7], "guidance_scale": 4.0},
        {"guidance_scale": 4.0},
    ),
    "pixart": (
        lambda load: load("pixart"),
        {"prompt": PROMPTS, "guidance_scale": 4.0, **SMALL, "use_resolution_binning": False},
        {"guidance_scale": 4.0},
    ),
}


@pytest.mark.parametrize("name", sorted(OTHER_CALLS))
def test_the_loss_falls_in_pipelines_of_other_calls(pipeline: Any, name: str) -> None:
    """Of pixels, of classes with the unconditional half last, and of prompts of another kind."""
    make, call, known = OTHER_CALLS[name]
    pipe, losses = make(pipeline), []
    pipe.set_progress_bar_config(disable=True)
    if name in ("ddpm", "ddim"):
        call = {"batch_size": 2}
    for guidance in (IDLE, Guidance(Near(-1.0), Capped(Normalised(1.0), 0.1), window=LATE)):
        draws = [torch.Generator().manual_seed(row) for row in range(2)]
        with guide(pipe, guidance, **known) as guided:
            pipe(num_inference_steps=6, generator=draws, output_type="np", **call)
        losses.append(guided.trace.loss[-1])
        assert bool(guided.trace.finished.all())
    assert bool((losses[1] < losses[0]).all())


OWN = [("sd", 4.0), ("sd", 1.0), ("sd2-v", 4.0), ("sd3", 4.0), ("flux", 1.0), ("wan", 4.0)]


SHIFTS = [Scheduled(8.0, "score"), Capped(Normalised(1.0), 0.1)]
BY_THE_GAP = [(name, 4.0, FreeDoMCfg(0.05)) for name in ("sd", "sd2-v", "sd3")]
BY_THE_GAP += [("wan", 4.0, FreeDoMCfg(10.0))]  # whose random weights hardly hear a prompt


@pytest.mark.parametrize(
    ("name", "scale", "rule"), [(*own, rule) for own in OWN for rule in SHIFTS] + BY_THE_GAP
)
def test_deterministic_first_order_steps_are_those_of_our_own_loop(
    folders: Any, pipeline: Any, name: str, scale: float, rule: Any
) -> None:
    pipe = pipeline(name)
    size, frames = (CALLS[name]["height"], CALLS[name]["width"]), CALLS[name].get("num_frames")
    loaded = load_denoiser_of(folders(name), size, frames)
    noise = torch.randn(
        2, *loaded.denoiser.sample_shape, generator=torch.Generator().manual_seed(1)
    )
    packed = loaded.family.pipeline_latents if name == "flux" else (lambda latents: latents)
    guidance = Guidance(Near(-1.0), rule, window=LATE)
    options = {} if name == "flux" else {"guidance_scale": scale}
    with guide(pipe, guidance) as guided:
        theirs = run(pipe, name, latents=packed(noise), **options)
    times = torch.cat([pipe.scheduler.timesteps.double(), torch.zeros(1).double()])
    ours = guided_sample(
        Guided(loaded.denoiser, scale),
        noise,
        loaded.text.encode(PROMPTS),
        times,
        Guidance(Decoded(Near(-1.0), loaded.latents), rule, window=LATE),
    )
    torch.testing.assert_close(theirs, packed(ours.samples), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided.trace.loss, ours.trace.loss, rtol=1e-4, atol=1e-4)
    moved = ours.trace.displacement
    torch.testing.assert_close(guided.trace.displacement, moved, rtol=1e-3, atol=1e-5)
    assert float(moved.max()) > 1e-3
    assert guided.trace.times == ours.trace.times


SCHEDULERS = [
    ("sd", DPMSolverMultistepScheduler, {}),
    ("sd", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    ("sd", UniPCMultistepScheduler, {}),
    ("sd", EulerDiscreteScheduler, {}),
    ("sd", EulerAncestralDiscreteScheduler, {}),
    ("sd", HeunDiscreteScheduler, {}),
    ("sd", PNDMScheduler, {}),  # that of released Stable Diffusion, with its Runge-Kutta beginning
    ("sd", PNDMScheduler, {"skip_prk_steps": True}),
    ("sd", DEISMultistepScheduler, {}),
    ("sd", LMSDiscreteScheduler, {}),
    ("sd", LCMScheduler, {}),
    ("sd", TCDScheduler, {}),
    ("sd2-v", DPMSolverMultistepScheduler, {}),
    ("sd3", FlowMatchEulerDiscreteScheduler, {"shift": 1.0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "options"), SCHEDULERS)
def test_all_kinds_of_schedulers_lead_to_a_lower_loss(
    pipeline: Any, name: str, kind: Any, options: dict[str, Any]
) -> None:
    pipe, losses = pipeline(name), []
    given = {k: v for k, v in pipe.scheduler.config.items() if k != "rescale_betas_zero_snr"}
    pipe.scheduler = kind.from_config(given, **options)
    for strength in (0.0, 100.0):
        rule = Capped(Scheduled(strength, "score"), 0.1)
        with guide(pipe, Guidance(Near(-1.0), rule, window=LATE), largest_move=None) as guided:
            run(pipe, name, steps=8)
        losses.append(guided.trace.loss[-1])
    assert bool((losses[1] < losses[0]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipelines_in_half_precision_are_guided(pipeline: Any, dtype: torch.dtype) -> None:
    pipe, losses = pipeline("sd").to(dtype), []
    for strength in (0.0, 100.0):
        rule = Capped(Scheduled(strength, "score"), 0.1)
        with guide(pipe, Guidance(Near(-1.0), rule)) as guided:
            assert run(pipe, "sd").dtype == dtype
        losses.append(guided.trace.loss[-1])
        assert guided.trace.gradient_norm.min() > 0
    assert bool((losses[1] < losses[0] - 0.01).all())


def test_levels_are_those_that_the_schedulers_noise_samples_with() -> None:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    x0, noise = torch.randn(2, 1, 3, 4, 4).double()
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        scheduler = kind(**betas, **({"clip_sample": False} if kind is DDIMScheduler else {}))
        scheduler.set_timesteps(5)
        schedule = SchedulerSteps(scheduler)
        assert len(schedule.steps) == 5
        for number, t in enumerate(scheduler.timesteps):
            scheduler._step_index = number
            noisy = scheduler.add_noise(x0, noise, t[None])
            seen = scheduler.scale_model_input(noisy, t)
            assert schedule.first(float(t)) == number
            step = schedule.at(number)
            assert step.index == number
            torch.testing.assert_close(
                seen, step.alpha * x0 + step.sigma * noise, rtol=1e-4, atol=1e-4
            )
    with pytest.raises(FewstepError, match="no such time"):
        schedule.first(400.0)
    with pytest.raises(FewstepError, match="goes on after all 5 steps"):
        schedule.at(5)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(clip_sample=True), DPMSolverMultistepScheduler(thresholding=True)],
    ids=["clip_sample", "thresholding"],
)
def test_schedulers_that_clip_are_refused(scheduler: Any) -> None:
    scheduler.set_timesteps(5)
    with pytest.raises(FewstepError, match=r"(clip_sample|thresholding)=False"):
        SchedulerSteps(scheduler)


def test_a_run_knows_where_it_is_though_its_times_are_rounded(pipeline: Any) -> None:
    """In bfloat16 times near 1000 are four apart, and FLUX's network is told these."""
    pipe = pipeline("flux").to(torch.bfloat16)
    idle = Guidance(Near(-1.0), clean=Normalised(0.0), clean_noise="matched", window=LATE)
    with guide(pipe, idle) as guided:
        run(pipe, "flux", sigmas=[1.0, 0.999, 0.998, 0.997, 0.995, 0.5])
    times = pipe.scheduler.timesteps.tolist()
    assert len(set(times)) == 6
    assert guided.trace.times == tuple(t for t in times if t <= 999)
    assert len(guided.trace.times) > 2
    assert guided.trace.costs.denoiser_evaluations == 6


@pytest.mark.parametrize("order", [1, 2])
def test_a_run_from_a_picture_begins_on_the_way(pipeline: Any, order: int) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**pipeline("sd").components)
    if order == 2:  # comes by each time twice, and begins at the second
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.zeros(2, 3, 16, 16)
    options = {"num_inference_steps": 8, "strength": 0.5, "output_type": "latent"}
    with guide(pipe, DARK) as guided:
        pipe(PROMPTS, picture, **options)
    assert guided.trace.times == tuple(pipe.scheduler.timesteps[4 * order :].tolist())
    early = replace(DARK, window=Window(low=800))
    with guide(pipe, early), pytest.raises(FewstepError, match="is in its window"):
        pipe(PROMPTS, picture, **options)


def test_solvers_of_second_order_come_by_each_time_twice(pipeline: Any) -> None:
    pipe = pipeline("sd")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    idle = Guidance(Near(-1.0), clean=Normalised(0.0), clean_noise="matched")
    with guide(pipe, idle) as guided:
        run(pipe, "sd", steps=3)
    assert guided.trace.times == tuple(pipe.scheduler.timesteps.tolist())
    assert len(set(guided.trace.times)) == 3


def test_the_time_of_a_run_ends_with_it(pipeline: Any) -> None:
    pipe = pipeline("sd")
    with guide(pipe, IDLE) as guided:
        started = time.perf_counter()
        run(pipe, "sd")
        whole = time.perf_counter() - started
        first = guided.trace.costs.seconds
        time.sleep(0.05)
        assert guided.trace.costs.seconds == first
    assert 0 < first < whole


def test_guidance_that_moves_nothing_is_refused(pipeline: Any) -> None:
    pipe = pipeline("sd")
    nowhere = replace(DARK, window=Window(5000, 6000))
    with guide(pipe, nowhere), pytest.raises(FewstepError, match="is in its window"):
        run(pipe, "sd")
    flow = pipeline("sd3")
    last = Guidance(Near(-1.0), Capped(Normalised(1.0)), window=Window(high=300))
    with guide(flow, last), pytest.raises(FewstepError, match="there is none at clean data"):
        run(flow, "sd3", steps=2)


def test_checkpointing_changes_no_sample(pipeline: Any) -> None:
    pipe, found = pipeline("sd"), []
    for checkpointing in (False, True):
        with guide(pipe, DARK, checkpointing=checkpointing):
            found.append(run(pipe, "sd"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_no_batch_mate(pipeline: Any) -> None:
    pipe = pipeline("sd")
    guidance = Guidance(
        Near(), Capped(Polyak(0.1, "eps_norm"), 0.1), augmentor=DiffAugment(3, joint=False)
    )
    targets = torch.stack([-torch.ones(3, 16, 16), torch.ones(3, 16, 16)])
    with guide(pipe, guidance, targets):
        together = run(pipe, "sd")
    with guide(pipe, guidance, targets[:1]):
        draws = [torch.Generator().manual_seed(0)]
        alone = run(pipe, "sd", prompt=PROMPTS[:1], generator=draws)
    torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=1e-4)
    with guide(pipe, guidance, targets[:1]), pytest.raises(FewstepError, match="1 targets"):
        run(pipe, "sd")


def test_with_its_own_generator_a_sample_depends_on_no_place_in_the_batch(
    pipeline: Any,
) -> None:
    pipe = pipeline("sd")
    rule = Capped(Polyak(0.1, "eps_norm"), 0.1)
    guidance = Guidance(Near(-1.0), rule, augmentor=DiffAugment(3))

    def sampled(rows: list[int], own: bool = True) -> Tensor:
        draws = [torch.Generator().manual_seed(row) for row in rows]
        prompts = [PROMPTS[row] for row in rows]
        with guide(pipe, guidance, generator=draws if own else None):
            return run(pipe, "sd", prompt=prompts, generator=draws)

    together, alone = sampled([0, 1]), sampled([1])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
    together, alone = sampled([0, 1], own=False), sampled([1], own=False)
    assert (alone[0] - together[1]).abs().max() > 1e-2  # views of another place
    one: Any = torch.Generator()
    with (
        pytest.raises(FewstepError, match="each sample its own"),
        guide(pipe, guidance, None, generator=one),
    ):
        pass
    few = [torch.Generator()]
    with guide(pipe, guidance, generator=few), pytest.raises(FewstepError, match="1 generators"):
        run(pipe, "sd")


def test_every_run_of_a_pipeline_has_views_of_its_own(pipeline: Any) -> None:
    pipe = pipeline("sd")
    guidance = Guidance(Near(-1.0), Capped(Normalised(1.0), 0.1), augmentor=DiffAugment(3))
    found = []
    for _ in range(2):
        with guide(pipe, guidance):
            found += [run(pipe, "sd"), run(pipe, "sd")]
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_frames_of_a_video_are_guided_through_their_decoder(pipeline: Any) -> None:
    pipe, codec = pipeline("animatediff"), None
    codec = LatentCodec.of(pipe.vae)
    energy = Decoded(EachFrame(Near(-1.0)), codec, frames=(1,), checkpointed=True)
    with guide(pipe, Guidance(energy, SCORE)) as guided:
        run(pipe, "animatediff")
    assert bool((guided.trace.gradient_norm > 0).all())


def test_a_moved_clean_estimate_needs_no_gradient_of_the_network(pipeline: Any) -> None:
    pipe, asked = pipeline("sd"), []
    pipe.unet.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    losses = []
    for strength in (0.0, 2.0):
        rule = Normalised(strength, measure="rms")
        guidance = Guidance(Near(-1.0), clean=rule, clean_iterations=2, clean_noise="matched")
        with guide(pipe, guidance) as guided:
            run(pipe, "sd", steps=6)
        losses.append(guided.trace.loss[-1])
        assert guided.trace.costs.denoiser_gradients == 0
        assert guided.trace.costs.energy_evaluations == 12
    assert asked
    assert not any(asked)
    assert bool((losses[1] < losses[0]).all())


def test_what_a_shift_cannot_do_is_refused_at_once(pipeline: Any) -> None:
    pipe = pipeline("sd")
    everything = Guidance(Near(), SCORE, clean=SCORE, inner_steps=2, recurrence=Recurrence(2))
    with pytest.raises(FewstepError, match=r"matched.*inner_steps.*recurrence"):
        guide(pipe, everything).__enter__()
    assert "forward" not in vars(pipe.unet)


def test_after_a_failure_the_pipeline_is_as_it_was(pipeline: Any) -> None:
    pipe = pipeline("sd")
    before, scheduler = pipe.unet.forward, pipe.scheduler
    with guide(pipe, DARK):
        assert pipe.unet.forward != before
        assert not any(p.requires_grad for p in pipe.unet.parameters())
        run(pipe, "sd", steps=1)
        assert "step" in vars(scheduler)
    with pytest.raises(ValueError, match="Provide either"), guide(pipe, DARK):
        pipe()
    assert pipe.unet.forward == before
    assert pipe.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert all(p.requires_grad for p in pipe.vae.parameters())


def test_what_pipelines_do_that_guidance_cannot_follow_is_refused(pipeline: Any) -> None:
    pipe = pipeline("sd")
    with guide(pipe, DARK), pytest.raises(FewstepError, match="guidance_rescale=0"):
        run(pipe, "sd", guidance_rescale=0.7)
    with guide(pipe, DARK), torch.inference_mode(), pytest.raises(FewstepError, match="inference"):
        run(pipe, "sd")
    with pytest.raises(FewstepError, match="leave it out of guide"):
        guide(pipe, DARK, guidance_scale=4.0).__enter__()
    with pytest.raises(FewstepError, match="does not know how a dict"):
        guide({}, DARK).__enter__()
    with pytest.raises(FewstepError, match="no guided step"), guide(pipe, DARK) as guided:
        _ = guided.trace
    with (
        pytest.raises(FewstepError, match="diverged"),
        guide(pipe, Guidance(Near(-1.0), Normalised(1e4))),
    ):
        run(pipe, "sd")


@pytest.mark.parametrize("way", ["model", "model with a hook", "sequential", "group"])
def test_networks_that_leave_the_device_after_a_call_are_refused(pipeline: Any, way: str) -> None:
    accelerate, here = pytest.importorskip("accelerate"), torch.device("cpu")
    pipe = pipeline("sd")
    if way == "model with a hook":
        accelerate.hooks.add_hook_to_module(pipe.unet, accelerate.hooks.ModelHook(), append=True)
    if way.startswith("model"):  # as enable_model_cpu_offload does
        accelerate.cpu_offload_with_hook(pipe.unet, here)
    elif way == "sequential":  # as enable_sequential_cpu_offload does
        accelerate.cpu_offload(pipe.vae, here)
    else:
        pipe.unet.enable_group_offload(here, here, "leaf_level")
    with pytest.raises(FewstepError, match="remove_all_hooks"):
        guide(pipe, DARK).__enter__()


def test_a_text_encoder_may_leave_the_device(pipeline: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = pipeline("sd")
    accelerate.cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu"))
    with guide(pipe, DARK) as guided:
        run(pipe, "sd", steps=2)
    assert guided.trace.displacement.max() > 0


def test_pure_noise_of_a_flow_has_no_score(pipeline: Any) -> None:
    pipe = pipeline("sd3")
    with guide(pipe, DARK), pytest.raises(FewstepError, match="window's high below 1000"):
        run(pipe, "sd3")


def test_a_rule_that_measures_by_the_guidance_scale_needs_one(pipeline: Any) -> None:
    pipe, rule = pipeline("sd"), Guidance(Near(-1.0), FreeDoMCfg())
    with guide(pipe, rule), pytest.raises(FewstepError, match="the pipeline's guidance_scale"):
        run(pipe, "sd", guidance_scale=1.0)


def test_the_true_guidance_of_flux_is_asked_for_and_then_combined(pipeline: Any) -> None:
    pipe = pipeline("flux")
    options = {"true_cfg_scale": 3.0, "negative_prompt": ["b", "c"]}
    guidance = Guidance(Near(-1.0), Capped(Normalised(1.0), 0.1), window=LATE)
    with guide(pipe, guidance), pytest.raises(FewstepError, match="true_cfg_scale"):
        run(pipe, "flux", **options)
    with guide(pipe, guidance, guidance_scale=3.0) as guided:
        run(pipe, "flux", **options)
    assert guided.trace.costs.denoiser_evaluations == 4
    assert len(guided.trace.times) == 3
