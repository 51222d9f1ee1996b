"""Each family, from a folder saved by diffusers, against its own pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fewstep.diffusion.denoiser import Denoiser, Guided
from fewstep.diffusion.samplers import ode_sample
from fewstep.diffusion.schedules import FlowSchedule
from fewstep.errors import FewstepError
from fewstep.networks.discriminator import FeatureDiscriminator, tapped
from fewstep.networks.families.flux import packed, unpacked
from fewstep.networks.pipelines import LoadedPipeline, load_denoiser_of
from lightning_modules.parallel import shard

from tiny_transformers import SAVES, loaded_by_diffusers, save_flux

SIZE = (16, 16)
PROMPTS = ["a b", "moving c"]
GUIDANCE = 3.0
STEPS = 4  # DDIM's steps of 1000 // n meet the times it visits where n divides 1000
IMAGE = {"height": 16, "width": 16}


def ids(latents: Tensor) -> dict[str, Tensor]:
    """Flux's positions as its pipeline makes them."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    made = diffusers.FluxPipeline._prepare_latent_image_ids(
        1, rows, columns, latents.device, latents.dtype
    )
    return {"img_ids": made}


def by_flux(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    b, c, h, w = x.shape
    tokens = network(
        hidden_states=diffusers.FluxPipeline._pack_latents(x, b, c, h, w),
        timestep=t / 1000,
        guidance=torch.full((b,), 3.5),
        txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3),
        **ids(x),
        **cond,
    ).sample
    return diffusers.FluxPipeline._unpack_latents(tokens, 2 * h, 2 * w, 2)


def by_ltx(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    frames, height, width = x.shape[2:]
    tokens = network(
        diffusers.LTXPipeline._pack_latents(x),
        timestep=t,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(4 / 25, 4, 4),
        **cond,
    ).sample
    return diffusers.LTXPipeline._unpack_latents(tokens, frames, height, width)


def by_unet(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return network(x, t, **cond).sample


def by_sdxl(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(x), 1)
    added = {"text_embeds": cond["text_embeds"], "time_ids": sizes}
    return network(x, t, cond["encoder_hidden_states"], added_cond_kwargs=added).sample


def by_animatediff(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    text = cond["encoder_hidden_states"].repeat_interleave(x.shape[2], dim=0)
    return network(x, t, text).sample


def by_transformer(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return network(x, timestep=t, **cond).sample


def by_learned_variance(network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    added = {"resolution": None, "aspect_ratio": None}
    extra = {} if "class_labels" in cond else {"added_cond_kwargs": added}
    return network(x, timestep=t, **cond, **extra).sample.chunk(2, dim=1)[0]


@dataclass(frozen=True)
class Case:
    """A family: how its network is called and its pipeline run.

    Attributes:
        call: calls the network by hand as the pipeline does.
        run: arguments of the pipeline's call.
        part: where the network is in the pipeline.
        size, frames: of samples in pixels.
        blocks: how many feature blocks the tiny network has.
    """

    call: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
    run: Mapping[str, Any]
    part: str = "transformer"
    size: int = 16
    frames: int | None = None
    blocks: int = 2


def unet_case(call: Any, run: Mapping[str, Any], frames: int | None = None) -> Case:
    return Case(call, run, part="unet", frames=frames, blocks=5)


CLIP = {**IMAGE, "num_frames": 3}
CASES = {
    "sd": unet_case(by_unet, IMAGE),
    "sd2-v": unet_case(by_unet, IMAGE),
    "sdxl": unet_case(by_sdxl, IMAGE),
    "sd3": Case(by_transformer, IMAGE),
    "flux": Case(by_flux, IMAGE),
    "pixart": Case(by_learned_variance, {**IMAGE, "use_resolution_binning": False}),
    "dit": Case(by_learned_variance, {}),
    "modelscope": unet_case(by_unet, CLIP, frames=3),
    "animatediff": unet_case(by_animatediff, CLIP, frames=3),
    "wan": Case(by_transformer, {**IMAGE, "num_frames": 5}, frames=5, blocks=1),
    "ltx": Case(by_ltx, {"height": 32, "width": 32, "num_frames": 9}, size=32, frames=9),
}
WITH_TEXT = [name for name in CASES if name != "dit"]


@dataclass
class Loaded:
    """A family's pipeline, loaded here and by diffusers."""

    case: Case
    ours: LoadedPipeline
    theirs: Any

    @property
    def denoiser(self) -> Denoiser:
        return self.ours.denoiser

    @property
    def network(self) -> Any:
        return getattr(self.theirs, self.case.part)

    def noise(self, seed: int = 0) -> Tensor:
        shape = (2, *self.denoiser.sample_shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def cond(self) -> dict[str, Tensor]:
        if self.ours.family.encode is None:
            return {"class_labels": torch.tensor([3, 7])}
        return self.ours.text.encode(PROMPTS)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """Each tiny pipeline is saved and loaded once."""
    made: dict[str, Loaded] = {}

    def loaded(name: str) -> Loaded:
        if name not in made:
            case = CASES[name]
            folder = SAVES[name](tmp_path_factory.mktemp(name))
            ours = load_denoiser_of(folder, (case.size, case.size), case.frames)
            theirs = loaded_by_diffusers(folder)
            theirs.set_progress_bar_config(disable=True)
            made[name] = Loaded(case, ours, theirs)
        return made[name]

    return loaded


@pytest.mark.parametrize("name", CASES)
def test_the_raw_output_is_that_of_the_network_called_as_its_pipeline_does(
    name: str, load: Any
) -> None:
    it = load(name)
    x, t, cond = it.noise(), torch.tensor([999.0, 250.0]), it.cond()
    with torch.no_grad():
        expected = it.case.call(it.network, x, t, cond)
    assert expected.std() > 0.01
    torch.testing.assert_close(it.denoiser.raw(x, t, cond), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
@pytest.mark.parametrize("name", CASES)
def test_the_ode_leads_where_the_pipeline_leads(
    name: str, guidance_scale: float, load: Any
) -> None:
    it = load(name)
    noise = it.noise()
    latents, times = by_pipeline(it, noise, guidance_scale)
    schedule = it.denoiser.schedule
    assert times[0] == pytest.approx(schedule.t_max, abs=1e-3)
    path = torch.cat([times.double(), torch.tensor([schedule.t_min]).double()])
    guided: Any = Guided(it.denoiser, guidance_scale)
    if name == "flux":  # whose own guidance is the network's input
        guided = it.denoiser
    found = ode_sample(guided, noise, it.cond(), path)
    assert (latents - noise).abs().mean() > 0.05
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


def by_pipeline(it: Loaded, noise: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """The pipeline's own latents with its deterministic sampler, and the times it visited."""
    pipe = it.theirs
    if not isinstance(it.denoiser.schedule, FlowSchedule):
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
    if it.ours.family.pipeline == "DiTPipeline":
        latents = dit_latents(pipe, noise, guidance_scale)
    else:
        kind = it.ours.family.pipeline
        given = {"FluxPipeline": packed, "LTXPipeline": pipe_tokens}.get(kind, torch.clone)(noise)
        options = dict(it.case.run)
        options["guidance_scale"] = 3.5 if kind == "FluxPipeline" else guidance_scale
        options["output_type"] = "latent"
        latents = pipe(PROMPTS, num_inference_steps=STEPS, latents=given, **options)[0]
        if kind == "FluxPipeline":
            latents = unpacked(latents, *noise.shape[-2:])
        if kind == "LTXPipeline":
            latents = latents.transpose(1, 2).unflatten(2, noise.shape[2:])
    return latents, pipe.scheduler.timesteps


def pipe_tokens(latents: Tensor) -> Tensor:
    return diffusers.LTXPipeline._pack_latents(latents)


def dit_latents(pipe: Any, noise: Tensor, guidance_scale: float) -> Tensor:
    """DiT's pipeline takes no latents and gives none: its noise is set, its VAE listened to."""
    module = diffusers.pipelines.dit.pipeline_dit
    heard: list[Tensor] = []
    decode = pipe.vae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda **_: noise.clone())
        patch.setattr(pipe.vae, "decode", lambda z: (heard.append(z), decode(z))[1])
        pipe([3, 7], guidance_scale, num_inference_steps=STEPS, output_type="pt")
    return heard[0] * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_rebuilds_it_without_the_folder(name: str, load: Any, tmp_path: Path) -> None:
    it = load(name)
    x, t, cond = it.noise(), torch.tensor([999.0, 250.0]), it.cond()
    torch.save({"spec": it.denoiser.to_spec(), "weights": it.denoiser.state_dict()}, tmp_path / "c")
    saved = torch.load(tmp_path / "c", weights_only=True)
    rebuilt = Denoiser.from_spec(saved["spec"]).requires_grad_(False).eval()
    with torch.no_grad():
        assert not torch.equal(rebuilt.raw(x, t, cond), it.denoiser.raw(x, t, cond))
        rebuilt.load_state_dict(saved["weights"])
        for guidance_scale in (1.0, GUIDANCE):
            found = rebuilt.guided(x, t, cond, guidance_scale)
            expected = it.denoiser.guided(x, t, cond, guidance_scale)
            assert torch.equal(found.x0, expected.x0)
    assert rebuilt.to_spec() == it.denoiser.to_spec()
    assert rebuilt.sample_shape == it.denoiser.sample_shape


@pytest.mark.parametrize("name", CASES)
def test_its_blocks_serve_a_discriminator_and_its_units_the_sharding(name: str, load: Any) -> None:
    it = load(name)
    backbone = it.denoiser.backbone
    x, t, cond = it.noise(), torch.tensor([999.0, 250.0]), it.cond()
    blocks = backbone.feature_blocks
    assert len(blocks) == it.case.blocks
    with tapped(backbone, list(blocks)) as taken, torch.no_grad():
        it.denoiser.raw(x, t, cond)
    for block, width in blocks.items():
        feature = taken[block]
        if feature.ndim == 3:  # of the sample's tokens, not of the text's
            assert feature.shape[1:] == (backbone.num_tokens, width)
        else:
            assert feature.shape[1] == width
    discriminator = FeatureDiscriminator(backbone, width=8)
    scores = discriminator(it.denoiser, x, t, cond)
    assert all(len(score) in (2, 2 * x.shape[2]) for score in scores)
    assert all(backbone.get_submodule(name) is not None for name in backbone.shard_units)
    in_units = sum(
        parameter.numel()
        for unit in backbone.shard_units
        for parameter in backbone.get_submodule(unit).parameters()
    )
    assert in_units > 0.3 * sum(parameter.numel() for parameter in backbone.parameters())


@pytest.mark.parametrize("name", CASES)
def test_it_copies_takes_half_precision_and_carries_gradient(name: str, load: Any) -> None:
    it = load(name)
    t, cond = torch.tensor([999.0, 250.0]), it.cond()
    x = it.noise().requires_grad_()
    output = it.denoiser.raw(x, t, cond)
    output.square().mean().backward()
    assert x.grad is not None
    assert x.grad.abs().amax(dim=tuple(range(1, x.ndim))).min() > 0
    twin = copy.deepcopy(it.denoiser)
    assert torch.equal(twin.raw(x, t, cond), output)
    twin.backbone.to(torch.bfloat16)
    half = twin.guided(x.detach(), t, cond, GUIDANCE)
    exact = it.denoiser.guided(x.detach(), t, cond, GUIDANCE)
    assert half.eps.dtype == torch.float32
    error = (half.eps - exact.eps).norm() / exact.eps.norm()
    assert 0 < error < 0.05
    assert torch.equal(it.denoiser.raw(x, t, cond), output)  # the copy shares nothing


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A world of one: parameters are sharded, and only there where they are gathered."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_it_runs_sharded_by_its_units(name: str, load: Any, mesh: DeviceMesh) -> None:
    it = load(name)
    t, cond = torch.tensor([999.0, 250.0]), it.cond()
    exact = it.denoiser.guided(it.noise(), t, cond, GUIDANCE).eps
    for precision, bound in ((None, 1e-5), (torch.bfloat16, 0.1)):
        sharded = copy.deepcopy(it.denoiser).requires_grad_(True)
        shard(sharded, mesh, precision)
        with torch.autocast("cpu", precision, enabled=precision is not None):  # as Lightning does
            found = sharded.guided(it.noise(), t, cond, GUIDANCE).eps
        assert (found - exact).norm() / exact.norm() < bound
        found.square().mean().backward()
        assert all(parameter.grad is not None for parameter in sharded.parameters())


@pytest.mark.parametrize("name", WITH_TEXT)
def test_guidance_refuses_text_of_another_length(name: str, load: Any) -> None:
    it = load(name)
    backbone = it.denoiser.backbone
    cond = it.cond()
    null = backbone.null_cond(cond)
    assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in cond.items()}
    assert all(null[k].dtype == cond[k].dtype for k in cond)
    if name == "sdxl":  # zeros have any length
        return
    cond["encoder_hidden_states"] = cond["encoder_hidden_states"][:, :5]
    with pytest.raises(FewstepError, match="encode the text as the pipeline does"):
        backbone.null_cond(cond)


def test_consecutive_times_of_a_flow_follow_its_dynamic_shift(load: Any) -> None:
    for name in ("flux", "ltx"):
        it = load(name)
        it.theirs(
            PROMPTS, num_inference_steps=4, output_type="latent", **it.case.run, guidance_scale=1.0
        )
        visited = it.theirs.scheduler.timesteps
        assert all(late < early for early, late in pairwise(visited.tolist()))
        own = it.denoiser.schedule.spaced_times(4)[:-1].float()
        torch.testing.assert_close(own, visited, atol=1e-3, rtol=1e-6)


def test_dit_drops_no_labels_in_train_mode(load: Any) -> None:
    denoiser = copy.deepcopy(load("dit").denoiser).train()
    x, t = load("dit").noise(), torch.full((2,), 500.0)
    cond = {"class_labels": torch.tensor([3, 7])}
    first = denoiser.raw(x, t, cond)
    assert all(torch.equal(denoiser.raw(x, t, cond), first) for _ in range(8))
    assert denoiser.backbone.null_cond(cond)["class_labels"].tolist() == [1000, 1000]


def test_sdxl_is_told_other_sizes_if_one_says_so(load: Any) -> None:
    it = load("sdxl")
    x, t = it.noise(), torch.full((2,), 500.0)
    own = it.denoiser.raw(x, t, it.cond())
    same = it.denoiser.raw(x, t, it.ours.text.encode(PROMPTS, SIZE))
    other = it.denoiser.raw(x, t, it.ours.text.encode(PROMPTS, (512, 768)))
    assert torch.equal(own, same)
    assert not torch.allclose(own, other)
    assert it.ours.text.encode(PROMPTS, (512, 768))["time_ids"].tolist()[1] == [
        *(512, 768, 0, 0, 512, 768)
    ]


def test_flux_takes_a_scale_and_schnell_none(load: Any, tmp_path: Path) -> None:
    it = load("flux")
    x, t, cond = it.noise(), torch.full((2,), 500.0), it.cond()
    own = it.denoiser.raw(x, t, cond)
    assert torch.equal(own, it.denoiser.raw(x, t, {**cond, "guidance": torch.full((2,), 3.5)}))
    other = it.denoiser.raw(x, t, {**cond, "guidance": torch.tensor([3.5, 9.0])})
    assert torch.allclose(own[0], other[0], atol=1e-6)
    assert not torch.allclose(own[1], other[1], atol=1e-6)
    schnell = load_denoiser_of(save_flux(tmp_path, guidance_embeds=False), SIZE).denoiser
    given = {**cond, "guidance": torch.full((2,), 9.0)}
    assert torch.equal(schnell.raw(x, t, cond), schnell.raw(x, t, given))


def test_packing_is_the_pipelines(load: Any) -> None:
    latents = torch.randn(2, 4, 6, 10)
    expected = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(packed(latents), expected)
    assert torch.equal(unpacked(expected, 6, 10), latents)


def test_a_unet_with_a_guidance_embedding_takes_one(load: Any) -> None:
    backbone = load("sd").denoiser.backbone
    assert backbone.guidance_input is None
    spec = {**backbone.config, "guidance_embedding_dim": 8}
    student = type(backbone)(**spec).eval()
    assert student.guidance_input == "timestep_cond"
    assert student.config["guidance_embedding_dim"] == 8
    x, t, cond = load("sd").noise(), torch.full((2,), 500.0), load("sd").cond()
    first, second = (student(x, t, **cond, timestep_cond=torch.randn(2, 8)) for _ in range(2))
    assert not torch.allclose(first, second)
