"""Methods that train adapters: what is shared, what is saved, and that it is the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.loading import load_denoiser
from fewstep.networks.lora import LoRA
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
    Pretrained,
)

from captioned import PROMPTS, Captioned, trained
from rings import quiet_trainer
from tiny_pipelines import save_stable_diffusion
from tiny_transformers import save_sd3

SMALL = LoRA(rank=4)


@pytest.fixture(scope="module", params=[pytest.param("sd", marks=pytest.mark.slow), "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"sd": save_stable_diffusion, "sd3": save_sd3}[request.param]
    return save(tmp_path_factory.mktemp("pipelines") / request.param)


def source(folder: Path) -> Pretrained:
    return Pretrained(str(folder), (16, 16))


def adversarial(folder: Path, **options: Any) -> FewStepModule:
    return PhasedConsistencyDistillation(
        source(folder),
        2,
        50,
        guidance_range=(2.0, 3.0),
        adversarial_weight=0.1,
        head_width=8,
        lora=SMALL,
        ema_decay=0.9,
        **options,
    )


def pictures() -> Captioned:
    generator = torch.Generator().manual_seed(0)
    return Captioned(torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1)


def teachers_say(module: FewStepModule, noise: Tensor) -> Tensor:
    return module.sample(noise, None, 2, role="teacher", prompt=PROMPTS[:2])


def students_say(module: FewStepModule, noise: Tensor) -> Tensor:
    return module.sample(noise, None, 2, role="student", prompt=PROMPTS[:2])


def test_the_base_is_one_network_that_training_leaves_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    module = adversarial(folder)
    module.configure_model()
    noise = torch.randn(2, *module.sample_shape)
    before, students = teachers_say(module, noise), students_say(module, noise)
    given = noise, torch.full((2,), 500.0), load_denoiser_of(folder).text.encode(PROMPTS[:2])
    assert torch.equal(module.student(*given).x0, module.teacher(*given).x0)
    state = trained(module, pictures(), tmp_path, updates=3)
    assert torch.equal(teachers_say(module, noise), before)
    assert not torch.equal(students_say(module, noise), students)
    kinds = {name.split(".")[0] for name in state}
    assert kinds == {"student", "ema", "discriminator"}
    base = load_denoiser_of(folder).denoiser
    size = sum(value.numel() for name, value in state.items() if name[:7] == "student")
    assert size < 0.5 * sum(parameter.numel() for parameter in base.parameters())


def test_recomputed_activations_do_not_mix_the_adapters_up(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = trained(adversarial(folder), pictures(), tmp_path, updates=3)
    torch.manual_seed(0)
    again = trained(
        adversarial(folder, checkpoint_activations=True), pictures(), tmp_path, updates=3
    )
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)


def test_a_saved_adapter_is_loaded_onto_its_base(folder: Path, tmp_path: Path) -> None:
    module = ConsistencyDistillation(source(folder), 50, lora=SMALL, ema_decay=0.9)
    trainer = quiet_trainer(tmp_path, [], 2)
    trainer.fit(module, pictures(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    loaded = load_denoiser(tmp_path / "lora.ckpt").denoiser
    assert loaded.sample_shape == module.sample_shape
    assert module.ema is not None
    x, t = torch.randn(2, *module.sample_shape), torch.full((2,), 500.0)
    cond = load_denoiser_of(folder).text.encode(PROMPTS[:2])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, cond).x0, module.ema(x, t, cond).x0)
        assert not torch.equal(loaded(x, t, cond).x0, module.teacher(x, t, cond).x0)


@pytest.mark.slow
def test_a_lora_student_teaches_others(folder: Path, tmp_path: Path) -> None:
    first = ConsistencyDistillation(source(folder), 50, lora=SMALL, ema_decay=0.9)
    trainer = quiet_trainer(tmp_path, [], 2)
    trainer.fit(first, pictures(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = PhasedConsistencyDistillation(str(tmp_path / "first.ckpt"), 2, 50, lora=SMALL)
    quiet_trainer(tmp_path, [], 1).fit(second, pictures(), weights_only=True)
    assert first.ema is not None
    x, t = torch.randn(2, *first.sample_shape), torch.full((2,), 500.0)
    cond = load_denoiser_of(folder).text.encode(PROMPTS[:2])
    with torch.no_grad():
        mine, expected = second.teacher(x, t, cond).x0, first.ema(x, t, cond).x0
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert second.companions is not None, "text encoders come with the first teacher"
    trainer = quiet_trainer(tmp_path, [], 1)
    trainer.fit(second, pictures(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    assert load_denoiser(tmp_path / "second.ckpt").pipeline == str(folder)


def test_a_lora_run_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    def fit(updates: int, resume: str | None = None) -> FewStepModule:
        torch.manual_seed(0)
        module = adversarial(folder)
        trainer = quiet_trainer(tmp_path, [], updates)
        trainer.fit(module, pictures(), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{updates}.ckpt")
        return module

    whole = fit(4).state_dict()
    fit(2)
    rest = fit(4, str(tmp_path / "2.ckpt")).state_dict()
    for name, value in whole.items():
        assert torch.equal(rest[name], value), name


def test_masks_of_dropout_are_drawn_again_when_a_run_resumes(folder: Path, tmp_path: Path) -> None:
    def fit(updates: int, seed: int, resume: str | None = None, dropout: float = 0.5) -> Any:
        torch.manual_seed(seed)
        lora = LoRA(rank=4, dropout=dropout)
        module = ConsistencyDistillation(source(folder), 50, lora=lora, ema_decay=0.9)
        trainer = quiet_trainer(tmp_path, [], updates)
        trainer.fit(module, pictures(), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{updates}.ckpt")
        return module.state_dict()

    whole = fit(3, 1)
    fit(2, 2)
    rest = fit(3, 3, str(tmp_path / "2.ckpt"))
    for name, value in whole.items():
        assert torch.equal(rest[name], value), name
    without = fit(3, 1, dropout=0.0)
    assert any(not torch.equal(without[name], value) for name, value in whole.items())


def test_a_changed_base_is_refused(folder: Path, tmp_path: Path) -> None:
    module = ConsistencyDistillation(source(folder), 50, lora=SMALL)
    trainer = quiet_trainer(tmp_path, [], 1)
    trainer.fit(module, pictures(), weights_only=True)
    path = tmp_path / "lora.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["fewstep"]["frozen"]["teacher"]["sha256"] = "0" * 64
    torch.save(checkpoint, path)
    with pytest.raises(FewstepError, match="has changed since this LoRA was trained"):
        load_denoiser(path)


def test_a_pipeline_is_fine_tuned_by_adapters(folder: Path, tmp_path: Path) -> None:
    module = DiffusionTraining(start=source(folder), lora=SMALL, ema_decay=0.9)
    state = trained(module, pictures(), tmp_path)
    assert {name.split(".")[0] for name in state} == {"student", "ema"}
    assert any(value.any() for name, value in state.items() if "lora_B" in name)


def test_adapters_need_something_to_adapt() -> None:
    with pytest.raises(FewstepError, match="either a backbone"):
        DiffusionTraining(lora=SMALL)
