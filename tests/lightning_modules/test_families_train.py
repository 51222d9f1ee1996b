"""Every model family with every method: a few updates from pixels and prompts, then samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import (
    AdversarialPostTraining,
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
    Pretrained,
)

from captioned import PROMPTS, Captioned, trained
from tiny_transformers import SAVES

VIDEO = {"modelscope": (16, 3), "animatediff": (16, 3), "wan": (16, 5), "ltx": (32, 9)}
"""Side and frames of the tiny clips; images have a side of 16."""

GUIDED = {"guidance_range": (2.0, 3.0), "ema_decay": 0.9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each pipeline once, when first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = SAVES[name](tmp_path_factory.mktemp(name))
            return self[name]

    return Folders()


def made(method: str, source: Pretrained) -> FewStepModule:
    if method == "teacher":
        return DiffusionTraining(start=source, ema_decay=0.9)
    if method == "lcm":
        return ConsistencyDistillation(source, 50, **GUIDED)
    if method == "apt":
        return AdversarialPostTraining(source, source, ema_decay=0.9)
    options: dict[str, Any] = {**GUIDED}
    if method == "adversarial":
        options |= {"adversarial_weight": 0.1, "head_width": 8}
    return PhasedConsistencyDistillation(source, 2, 50, **options)


def train_and_sample(name: str, folder: Path, method: str, tmp_path: Path) -> None:
    side, frames = VIDEO.get(name, (16, None))
    module = made(method, Pretrained(str(folder), (side, side), frames))
    clip = () if frames is None else (frames,)
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(2, 3, *clip, side, side, generator=generator) * 2 - 1
    labels = {"class_labels": torch.tensor([1, 2])} if name == "dit" else None
    state = trained(module, Captioned(sample, labels), tmp_path)
    assert all(value.isfinite().all() for value in state.values())
    before = module.teacher if hasattr(module, "teacher") else None
    if before is not None:
        moved = [
            not torch.equal(mine, theirs)
            for mine, theirs in zip(module.student.parameters(), before.parameters(), strict=True)
        ]
        assert sum(moved) > len(moved) / 2
    prompt = None if labels else PROMPTS[:2]
    noise = torch.randn(2, *module.sample_shape, generator=generator)
    for steps in [2] if method in ("pcm", "adversarial") else [1, 2]:
        drawn = module.decode(module.sample(noise, labels, steps, prompt=prompt))
        assert drawn.shape == sample.shape
        assert drawn.isfinite().all()


@pytest.mark.parametrize("name", SAVES)
def test_a_family_is_distilled_with_a_discriminator(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    train_and_sample(name, folders[name], "adversarial", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["teacher", "lcm", "pcm", "apt"])
@pytest.mark.parametrize("name", SAVES)
def test_a_family_is_trained_by_every_method(
    folders: dict[str, Path], tmp_path: Path, name: str, method: str
) -> None:
    train_and_sample(name, folders[name], method, tmp_path)


@pytest.mark.parametrize("told", [True, False])
def test_sdxl_learns_each_picture_as_the_crop_that_the_data_say(
    folders: dict[str, Path], tmp_path: Path, told: bool
) -> None:
    crops = [[64, 48, 8, 0, 16, 16], [1999, 3001, 0, 5, 16, 16]]  # as in half precision nothing is
    data = Captioned(torch.zeros(2, 3, 16, 16))
    if told:
        data.batch["cond"] = {"time_ids": torch.tensor(crops)}
    module = made("lcm", Pretrained(str(folders["sdxl"]), (16, 16)))
    module.configure_model()
    seen: list[list[list[float]]] = []

    def note(network: Any, inputs: Any, given: Any) -> None:
        seen.append(given["added_cond_kwargs"]["time_ids"].tolist())

    networks: Any = [module.student.backbone, module.teacher.backbone]
    for backbone in networks:
        backbone.network.register_forward_pre_hook(note, with_kwargs=True)
    trained(module, data, tmp_path, updates=1)
    expected = crops if told else [[16, 16, 0, 0, 16, 16]] * 2
    # The teacher's conditional and unconditional branch in one pass; the student and its target.
    assert seen == [expected * 2, expected, expected]
