"""Methods on diffusers pipelines: prompts and pixels in, pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
    Pretrained,
)
from lightning_modules.companions import Companions
from lightning_modules.roles import is_pipeline, load_teacher

from captioned import PROMPTS, Captioned, trained
from tiny_pipelines import save_stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny pipeline, as its user has it."""
    return save_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")


def pixels(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, size, size, generator=generator) * 2 - 1


def methods(folder: Path) -> dict[str, FewStepModule]:
    source: dict[str, Any] = {"ema_decay": 0.9}
    return {
        "teacher": DiffusionTraining(start=str(folder), **source),
        "lcm": ConsistencyDistillation(str(folder), 50, guidance_range=(2.0, 3.0), **source),
        "pcm": PhasedConsistencyDistillation(str(folder), 2, 50, **source),
        "adversarial": PhasedConsistencyDistillation(
            str(folder), 2, 50, adversarial_weight=0.1, head_width=8, **source
        ),
    }


@pytest.mark.parametrize("name", ["teacher", "lcm", "pcm", "adversarial"])
def test_a_pipeline_is_trained_on_pictures_and_captions_and_draws(
    folder: Path, tmp_path: Path, name: str
) -> None:
    module = methods(folder)[name]
    size = load_denoiser_of(folder).size[0]
    state = trained(module, Captioned(pixels(size)), tmp_path)
    assert not any("text_encoder" in key or "vae" in key for key in state)
    assert all(value.isfinite().all() for value in state.values())
    noise = torch.randn(2, *module.sample_shape)
    for steps in [2] if name in ("pcm", "adversarial") else [1, 4]:
        drawn = module.decode(module.sample(noise, None, steps, prompt=PROMPTS[:2]))
        assert drawn.shape == (2, 3, size, size)
        assert float(drawn.abs().max()) <= 1


def test_encoded_data_train_as_the_pictures_and_captions_they_were(
    folder: Path, tmp_path: Path
) -> None:
    pipeline = load_denoiser_of(folder)
    shown = pixels(pipeline.size[0])
    raw = ConsistencyDistillation(str(folder), 50)
    raw.configure_model()
    assert raw.companions is not None
    shape, backbone = raw.sample_shape, raw.student.backbone

    def noise() -> Tensor:
        return torch.zeros(4, *shape)

    latents = raw.companions.latents(shown, shape, noise)
    assert torch.equal(latents, pipeline.latents.encode(shown))
    cond = raw.companions.with_prompts({}, PROMPTS, backbone)
    expected = pipeline.text.encode(PROMPTS)["encoder_hidden_states"]
    assert torch.equal(cond["encoder_hidden_states"], expected)
    raw.companions.release()
    again = Companions(folder, torch.float32, offload=False)
    assert again.latents(latents, shape, noise) is latents
    assert again.with_prompts(cond, PROMPTS, backbone) is cond
    assert not {"text", "codec"} & set(vars(again)), "encoders were loaded for encoded data"


def test_pixels_of_another_size_say_what_to_set(folder: Path) -> None:
    module = ConsistencyDistillation(str(folder), 50)
    module.configure_model()
    assert module.companions is not None
    with pytest.raises(FewstepError, match="Pretrained has `size`"):
        module.companions.latents(pixels(64), module.sample_shape, Tensor)


def test_companions_compute_in_their_own_precision_within_autocast(folder: Path) -> None:
    module = ConsistencyDistillation(str(folder), 50)
    module.configure_model()
    companions = module.companions
    assert companions is not None
    latents = torch.randn(2, *module.sample_shape)
    shown = pixels(load_denoiser_of(folder).size[0])

    def computed() -> list[Tensor]:
        encoded = companions.latents(
            shown, module.sample_shape, lambda: torch.ones(4, *module.sample_shape)
        )
        text = companions.conditions(PROMPTS, encoded.device)["encoder_hidden_states"]
        return [companions.decoded(latents), encoded, text]

    plain = computed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = computed()
    assert all(torch.equal(*pair) for pair in zip(mixed, plain, strict=True))


def test_what_is_loaded_makes_room_and_comes_back(folder: Path) -> None:
    module = ConsistencyDistillation(str(folder), 50)
    module.configure_model()
    companions = module.companions
    assert companions is not None
    companions.release()
    assert not {"text", "codec"} & set(vars(companions)), "it loaded what nobody needs"
    latents = torch.randn(1, *module.sample_shape)
    before = companions.decoded(latents)
    moves: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(companions.codec, "to", moves.append)
        patch.setattr(companions.text, "offload", lambda: moves.append("text"))
        companions.release()
    assert moves == ["text", "cpu"]
    assert torch.equal(companions.decoded(latents), before)


def test_what_samples_are_asked_for_changes_them(folder: Path) -> None:
    module = methods(folder)["lcm"]
    module.configure_model()
    noise = torch.randn(1, *module.sample_shape)
    fox, owl = (module.sample(noise, None, 1, prompt=[text]) for text in PROMPTS[:2])
    assert not torch.equal(fox, owl)


def test_a_pipeline_says_where_a_teacher_is_from(folder: Path) -> None:
    denoiser, origin = load_teacher(str(folder))
    assert origin["pipeline"] == str(folder)
    assert origin["sha256"] == load_denoiser_of(folder).sha256
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_a_size_of_ones_own_is_a_shape_of_ones_own(folder: Path) -> None:
    native = load_denoiser_of(folder)
    side = 2 * native.size[0]
    larger, _ = load_teacher(Pretrained(str(folder), size=(side, side)))
    factor = [
        mine // theirs
        for mine, theirs in zip(larger.sample_shape, native.denoiser.sample_shape, strict=True)
    ]
    assert factor == [1, 2, 2]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stabilityai/sdxl-turbo", True),
        ("runs/digits", False),
        ("./models/sd15", False),
        ("/models/sd15", False),
        ("models/last.ckpt", False),
        ("runs/digits/teacher/version_0", False),
    ],
)
def test_names_of_the_hub_are_told_from_paths(source: str, expected: bool) -> None:
    assert is_pipeline(source) == expected


def test_a_name_that_is_nowhere_says_how_to_get_it() -> None:
    with pytest.raises(FewstepError, match=r"hf download REPOSITORY --local-dir nobody/nothing"):
        load_teacher("nobody/nothing")


def test_training_needs_a_network_or_a_place_to_start_from(folder: Path) -> None:
    with pytest.raises(FewstepError, match="`start`"):
        DiffusionTraining()
