"""Methods on real architectures: against the papers' formulas, and with their extra parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.contracts import Batch
from fewstep.diffusion import Guided, ode_sample
from fewstep.diffusion.consistency import guidance_embedding
from fewstep.errors import FewstepError
from fewstep.networks.loading import load_denoiser
from fewstep.networks.lora import LoRA
from lightning_modules import (
    ConsistencyDistillation,
    FewStepModule,
    PhasedConsistencyDistillation,
    Pretrained,
)
from lightning_modules.consistency_distillation import ConsistencyDraws

from captioned import PROMPTS, Captioned
from rings import quiet_trainer
from tiny_pipelines import image_vae, save_stable_diffusion, scheduler
from tiny_transformers import SAVES

SLOW = pytest.mark.slow
FRAMES = {"modelscope": 3, "animatediff": 3}
KINDS: dict[str, Callable[[Path], Path]] = {
    **SAVES,
    # Without a rescaled end, so that the formulas below have the plain betas for both predictions.
    "v": lambda folder: save_stable_diffusion(
        folder, scheduling=scheduler(prediction_type="v_prediction")
    ),
}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pretrained]:
    """A tiny pipeline of each kind, made once, as a teacher."""

    @cache
    def source(kind: str) -> Pretrained:
        folder = KINDS[kind](tmp_path_factory.mktemp(kind) / "pipeline")
        return Pretrained(str(folder), (16, 16), FRAMES.get(kind))

    return source


def pictures(frames: int | None = None) -> Captioned:
    clip = () if frames is None else (frames,)
    generator = torch.Generator().manual_seed(0)
    return Captioned(torch.rand(4, 3, *clip, 16, 16, generator=generator) * 2 - 1)


def text_of(module: FewStepModule, prompts: list[str]) -> dict[str, Tensor]:
    assert module.companions is not None
    return module.companions.with_prompts({}, prompts, module.student.backbone)


# ---------------------------------------------------------------------- formulas written out


class Level(NamedTuple):
    """A time as the network takes it, and the coefficients there."""

    t: float
    alpha: float
    sigma: float


def stable_diffusion_levels() -> Callable[[int], Level]:
    """Those of a train index, from the betas of Stable Diffusion."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    product = torch.cumprod(1 - roots**2, 0)

    def level(index: int) -> Level:
        return Level(index, float(product[index]) ** 0.5, float(1 - product[index]) ** 0.5)

    return level


def flow_level(share: float, shift: float = 3.0) -> Level:
    """That of a share of the way to noise: ``sigma = s u / (1 + (s - 1) u)``."""
    sigma = shift * share / (1 + (shift - 1) * share)
    return Level(1000 * sigma, 1 - sigma, sigma)


def moved(kind: str, x: Tensor, output: Tensor, a: Level, b: Level) -> Tensor:
    """Section 2.4: ``F(x, t, s)`` of a raw network output."""
    if kind == "sd":
        return b.alpha / a.alpha * x + (b.sigma - b.alpha * a.sigma / a.alpha) * output
    if kind == "v":
        clean = a.alpha * x - a.sigma * output
        noise = a.alpha * output + a.sigma * x
        return b.alpha * clean + b.sigma * noise
    return x + (b.sigma - a.sigma) * output


def said(network: Any, kind: str, x: Tensor, a: Level, cond: dict[str, Tensor]) -> Tensor:
    """The output of diffusers' own network."""
    time = torch.full((len(x),), a.t)
    if kind == "sd3":
        output = network(hidden_states=x, timestep=time, **cond)
    else:
        output = network(x, time, **cond)
    found: Tensor = output.sample
    return found


def grid_levels(kind: str, points: int, index: int) -> Level:
    """That of a grid point; of index -1, where trajectories end."""
    if kind == "sd3":
        return flow_level((index + 1) / points)
    return stable_diffusion_levels()(max((index + 1) * 1000 // points - 1, 0))


@pytest.mark.parametrize("kind", ["sd", "v", "sd3"])
def test_solver_step_phase_target_and_jump_are_the_papers_formulas(
    kind: str, source_of: Callable[[str], Pretrained]
) -> None:
    """Sections 2.2 to 2.6, on diffusers' own networks, sample by sample."""
    points, phases = 50, 4
    module = PhasedConsistencyDistillation(
        source_of(kind), phases, points, guidance_range=(3.0, 5.0)
    )
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # so that student and teacher are not the same
        for weight in module.student.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    assert module.companions is not None
    cond, null = text_of(module, PROMPTS[:1]), module.companions.text.null()
    rows = [0, 1, 12, 13, 24, 25, 36, 37, 38, 49]  # phases begin at 0, 12, 25 and 37
    count = len(rows)
    shape = (count, *module.sample_shape)
    x0, noise = torch.randn(2, *shape, generator=generator)
    draws = ConsistencyDraws(
        index=torch.tensor(rows),
        noise=noise,
        guidance=torch.linspace(3, 5, count),
        dropped=torch.zeros(count, dtype=torch.bool),
    )
    many = {name: value.expand(count, *value.shape[1:]) for name, value in cond.items()}
    batch: Batch = {"sample": x0, "cond": many, "key": [""] * count}
    with torch.no_grad():
        pair = module.pair(batch, draws)
    teacher, student = (role.backbone.network for role in (module.teacher, module.student))
    for row, index in enumerate(rows):
        begun = max(j * points // phases for j in range(phases) if j * points // phases <= index)
        now, before = grid_levels(kind, points, index), grid_levels(kind, points, index - 1)
        edge = grid_levels(kind, points, begun - 1)
        x = now.alpha * x0[row : row + 1] + now.sigma * noise[row : row + 1]
        w = float(draws.guidance[row]) - 1
        with torch.no_grad():
            with_text = said(teacher, kind, x, now, cond)
            without = said(teacher, kind, x, now, null)
            solved = moved(kind, x, (1 + w) * with_text - w * without, now, before)
            target = solved
            if before != edge:
                target = moved(
                    kind, solved, said(student, kind, solved, before, cond), before, edge
                )
            jump = moved(kind, x, said(student, kind, x, now, cond), now, edge)
        torch.testing.assert_close(pair.target[row : row + 1], target, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(pair.student[row : row + 1], jump, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["sd", "v", "sd3"])
def test_an_untrained_lora_in_as_many_steps_as_phases_is_the_teachers_ode(
    kind: str, guidance: float, source_of: Callable[[str], Pretrained]
) -> None:
    pytest.importorskip("peft")
    module = PhasedConsistencyDistillation(
        source_of(kind), 4, 40, lora=LoRA(rank=4), sampling_guidance=guidance
    )
    module.configure_model()
    edges = [grid_levels(kind, 40, j * 10 - 1).t for j in range(4, -1, -1)]
    noise = torch.randn(2, *module.sample_shape)
    cond = text_of(module, PROMPTS[:2])
    steered = Guided(module.teacher, guidance)
    expected = ode_sample(steered, noise, cond, torch.tensor(edges, dtype=torch.float64))
    for role in ("student", "ema"):
        assert torch.equal(module.sample(noise, cond, 4, role=role), expected)
    assert (expected - noise).abs().max() > 0.1


# ---------------------------------------------------------------------- the guidance embedding


def told(source: Pretrained, lora: LoRA | None = None) -> ConsistencyDistillation:
    return ConsistencyDistillation(
        source, 50, guidance_range=(2.0, 8.0), guidance_embedding=True, ema_decay=0.5, lora=lora
    )


def answers(role: Any, cond: dict[str, Tensor], shape: tuple[int, ...], scale: float) -> Tensor:
    """What a role predicts when it is told a guidance scale."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, *shape, generator=generator), torch.tensor([500.0, 999.0])
    embedded = guidance_embedding(torch.full((2,), scale), 256)
    with torch.no_grad():
        found: Tensor = role(x, t, {**cond, "timestep_cond": embedded}).eps
    return found


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "kind",
    ["sd", *(pytest.param(k, marks=SLOW) for k in ("v", "sdxl", "modelscope", "animatediff"))],
)
def test_a_student_with_a_new_guidance_input_starts_as_its_teacher(
    kind: str, lora: LoRA | None, source_of: Callable[[str], Pretrained]
) -> None:
    if lora:
        pytest.importorskip("peft")
    module = told(source_of(kind), lora)
    module.configure_model()
    assert module.student.backbone.config["guidance_embedding_dim"] == 256
    cond = text_of(module, PROMPTS[:2])
    x, t = torch.randn(2, *module.sample_shape), torch.tensor([500.0, 999.0])
    original = source_of(kind).load().denoiser
    copied = original.state_dict()
    for role in (module.teacher, module.student, module.ema):
        assert role is not None
        held = role.backbone.state_dict(prefix="backbone.")
        state = {name.replace(".base_layer.", "."): value for name, value in held.items()}
        added = state.pop("backbone.network.time_embedding.cond_proj.weight")
        assert not added.any()
        assert state.keys() == copied.keys()
        assert all(torch.equal(value, copied[name]) for name, value in state.items())
        with torch.no_grad():
            untold = role(x, t, cond).eps
            # Not to the bit between copies: how weights lie in memory decides on the last one.
            torch.testing.assert_close(untold, original(x, t, cond).eps, atol=1e-5, rtol=1e-5)
            for scale in (1.0, 2.0, 7.5):
                embedded = guidance_embedding(torch.full((2,), scale), 256)
                assert torch.equal(role(x, t, {**cond, "timestep_cond": embedded}).eps, untold)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=SLOW)])
def test_a_new_guidance_input_is_learnt_saved_and_read_again(
    kind: str, lora: LoRA | None, source_of: Callable[[str], Pretrained], tmp_path: Path
) -> None:
    if lora:
        pytest.importorskip("peft")
    module = told(source_of(kind), lora)
    module.configure_model()
    cond, shape = text_of(module, PROMPTS[:2]), module.sample_shape
    teachers = copy.deepcopy(module.teacher.state_dict())
    trainer = quiet_trainer(tmp_path, [], 3)
    trainer.fit(module, pictures(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "told.ckpt")
    assert all(torch.equal(v, teachers[n]) for n, v in module.teacher.state_dict().items())
    scales = [answers(module.ema, cond, shape, scale) for scale in (2.0, 7.5)]
    assert not torch.equal(*scales), "the student does not heed the scale"
    loaded = load_denoiser(tmp_path / "told.ckpt").denoiser
    assert torch.equal(answers(loaded, cond, shape, 7.5), scales[1])
    noise = torch.randn(2, *shape)
    assert module.sample(noise, cond, 2).isfinite().all()
    assert module.sample(noise, cond, 2, role="teacher").isfinite().all()
    resumed = told(source_of(kind), lora)
    again = quiet_trainer(tmp_path, [], 4)
    again.fit(resumed, pictures(), ckpt_path=str(tmp_path / "told.ckpt"), weights_only=True)
    assert again.global_step == 4


def test_a_lora_that_leaves_the_new_input_out_is_refused(
    source_of: Callable[[str], Pretrained],
) -> None:
    pytest.importorskip("peft")
    module = told(source_of("sd"), lora=LoRA(4, target_modules=["to_q"]))
    with pytest.raises(FewstepError, match="Add 'cond_proj'"):
        module.configure_model()
    chosen = LoRA(4, target_modules=["to_q", "cond_proj"])
    told(source_of("sd"), lora=chosen).configure_model()


def test_a_transformer_has_no_input_for_a_guidance_scale(
    source_of: Callable[[str], Pretrained],
) -> None:
    with pytest.raises(FewstepError, match="takes no guidance embedding"):
        told(source_of("sd3")).configure_model()


# ---------------------------------------------------------------------- the VAE's memory


def inputs_of(module: Any) -> list[torch.Size]:
    """Shapes of what a network is given from here on."""
    seen: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape))
    return seen


def with_vae(source: Pretrained, **options: Any) -> Any:
    module = ConsistencyDistillation(source, 50, **options)
    module.configure_model()
    assert module.companions is not None
    return module.companions


def test_tiles_keep_a_large_sample_from_being_decoded_at_once(tmp_path: Path) -> None:
    base = save_stable_diffusion(tmp_path, image_vae(scaling_factor=0.5, sample_size=32))
    source = Pretrained(str(base), (80, 80))
    whole, tiled = with_vae(source), with_vae(source, vae_tiling=True)
    latents = torch.randn(2, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    shapes = [inputs_of(companions.codec.vae.decoder) for companions in (whole, tiled)]
    at_once, in_tiles = whole.decoded(latents), tiled.decoded(latents)
    assert shapes[0] == [(1, 4, 40, 40)] * 2
    assert len(shapes[1]) > 8
    assert max(shape[-1] for shape in shapes[1]) == 16
    assert in_tiles.shape == at_once.shape == (2, 3, 80, 80)
    assert not torch.equal(in_tiles, at_once)
    # The pictures are the same but for what a tile's normalisation does not see of the rest.
    likeness = torch.corrcoef(torch.stack([in_tiles.flatten(), at_once.flatten()]))[0, 1]
    assert likeness > 0.9


def test_slices_change_no_number(source_of: Callable[[str], Pretrained]) -> None:
    whole, sliced = with_vae(source_of("sd")), with_vae(source_of("sd"), vae_slicing=True)
    shown = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def noise() -> Tensor:
        return torch.ones(4, 4, 8, 8)

    shapes = [inputs_of(companions.codec.vae.encoder) for companions in (whole, sliced)]
    found = [companions.latents(shown, (4, 8, 8), noise) for companions in (whole, sliced)]
    assert shapes == [[(4, 3, 16, 16)], [(1, 3, 16, 16)] * 4]
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)
    drawn = [companions.decoded(found[0]) for companions in (whole, sliced)]
    assert torch.equal(*drawn)


def test_a_vae_without_slices_says_so(
    source_of: Callable[[str], Pretrained], monkeypatch: pytest.MonkeyPatch
) -> None:
    companions = with_vae(source_of("sd"), vae_slicing=True)

    def refuse(_vae: object) -> None:
        raise NotImplementedError  # as diffusers' mixin does

    monkeypatch.setattr(AutoencoderKL, "enable_slicing", refuse)
    with pytest.raises(FewstepError, match="leave vae_slicing out"):
        _ = companions.codec


# ---------------------------------------------------------------------- a base that has moved


def lora_run(source: Pretrained, path: Path) -> ConsistencyDistillation:
    module = ConsistencyDistillation(source, 50, lora=LoRA(rank=4), ema_decay=0.5)
    trainer = quiet_trainer(path.parent, [], 2)
    trainer.fit(module, pictures(), weights_only=True)
    trainer.save_checkpoint(path)
    return module


@pytest.mark.slow
def test_a_lora_is_read_onto_a_base_that_has_moved_and_onto_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    base, elsewhere = KINDS["sd"](tmp_path / "base"), tmp_path / "elsewhere"
    module = lora_run(Pretrained(str(base), (16, 16)), tmp_path / "lora.ckpt")
    cond = text_of(module, PROMPTS[:2])
    base.rename(elsewhere)
    other = KINDS["sd"](tmp_path / "other")
    bias = "diffusion_pytorch_model.safetensors"
    (other / "unet" / bias).write_bytes((KINDS["v"](tmp_path / "v") / "unet" / bias).read_bytes())
    with pytest.raises(FewstepError, match=r"cannot be read.*--base FOLDER"):
        load_denoiser(tmp_path / "lora.ckpt")
    x, t = torch.randn(2, *module.sample_shape), torch.full((2,), 500.0)
    assert module.ema is not None
    with torch.no_grad():
        expected = module.ema(x, t, cond).x0
        given = load_denoiser(tmp_path / "lora.ckpt", base=elsewhere).denoiser
        assert torch.equal(given(x, t, cond).x0, expected)
        monkeypatch.setenv("FEWSTEP_BASE", str(elsewhere))
        found = load_denoiser(tmp_path / "lora.ckpt").denoiser
        assert torch.equal(found(x, t, cond).x0, expected)
    student = ConsistencyDistillation(str(tmp_path / "lora.ckpt"), 50)
    student.configure_model()  # it teaches others, too


@pytest.mark.slow
def test_a_run_goes_on_with_its_base_elsewhere_but_with_no_other(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, elsewhere = KINDS["sd"](tmp_path / "base"), tmp_path / "elsewhere"
    lora_run(Pretrained(str(base), (16, 16)), tmp_path / "lora.ckpt")
    base.rename(elsewhere)

    def go_on(folder: Path) -> int:
        source = Pretrained(str(folder), (16, 16))
        module = ConsistencyDistillation(source, 50, lora=LoRA(rank=4), ema_decay=0.5)
        trainer = quiet_trainer(tmp_path, [], 3)
        checkpoint = str(tmp_path / "lora.ckpt")
        trainer.fit(module, pictures(), ckpt_path=checkpoint, weights_only=True)
        return int(trainer.global_step)

    assert go_on(elsewhere) == 3
    other = KINDS["sd"](tmp_path / "other")
    network = ConsistencyDistillation(Pretrained(str(other), (16, 16)), 50)
    network.configure_model()
    unet: Any = network.student.backbone
    with torch.no_grad():
        unet.network.conv_in.bias.add_(1)
    unet.network.save_pretrained(other / "unet")
    with pytest.raises(FewstepError, match="sha256"):
        go_on(other)
    with pytest.raises(FewstepError, match="is another base, or has changed"):
        load_denoiser(tmp_path / "lora.ckpt", base=other)
