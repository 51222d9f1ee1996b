"""The two stages of APT: what each starts from, and the first where all has a closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fewstep.contracts import Batch
from fewstep.diffusion import Cond, Denoiser, FlowSchedule, ode_sample
from fewstep.errors import FewstepError
from fewstep.networks.loading import load_denoiser
from fewstep.networks.text import TextEncoding
from fewstep.seeding import torch_generator
from lightning_modules import (
    AdversarialPostTraining,
    ConsistencyDistillation,
    DiffusionTraining,
    Pretrained,
)
from lightning_modules.consistency_distillation import ConsistencyDraws
from lightning_modules.roles import load_teacher
from scripts.plan.roles import build_without_weights

from post_training import Flow, digits, flow
from rings import quiet_trainer
from tiny_students import save_student
from tiny_transformers import SAVES, save_wan
from training_runs import teacher, video_teacher


def test_each_network_starts_from_the_weights_of_the_stage_before(tmp_path: Path) -> None:
    diffusion, first = tmp_path / "diffusion.ckpt", tmp_path / "first.ckpt"
    save_student(DiffusionTraining(start=teacher, ema_decay=0.9), diffusion)
    stage = ConsistencyDistillation(
        str(diffusion), 20, guidance_range=(7.5, 7.5), loss="l2", ema_decay=0.9
    )
    save_student(stage, first)
    module = AdversarialPostTraining(str(first), str(diffusion))
    module.configure_model()
    wanted = load_denoiser(first, "ema").denoiser.state_dict()
    other = load_denoiser(first, "student").denoiser.state_dict()
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, wanted[name])
    assert any(not torch.equal(wanted[name], value) for name, value in other.items())
    backbone = module.discriminator.backbone
    source = load_denoiser(diffusion).denoiser.backbone.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in backbone.state_dict().items())
    assert any(not torch.equal(wanted[f"backbone.{n}"], v) for n, v in source.items())
    both = [*module.student.parameters(), *module.discriminator.parameters()]
    assert all(parameter.requires_grad for parameter in both)
    assert module.ema is not None
    kept = [p.data_ptr() for p in module.parameters()]
    assert len(kept) == len(set(kept))
    assert set(module.provenance) == {"start", "teacher"}


def test_a_stage_on_videos_starts_from_one_on_images(tmp_path: Path) -> None:
    folder, image = save_wan(tmp_path / "wan"), tmp_path / "image.ckpt"
    one, five = (Pretrained(str(folder), (16, 16), frames=frames) for frames in (1, 5))
    first = save_student(AdversarialPostTraining(one, one), image)
    assert first.sample_shape == (4, 1, 2, 2)
    video = AdversarialPostTraining(str(image), five)
    video.configure_model()
    assert video.sample_shape == (4, 2, 2, 2)
    wanted = load_denoiser(image, "ema").denoiser.state_dict()
    for name, value in video.student.state_dict().items():
        assert torch.equal(value, wanted[name])

    width = video.student.backbone.config["null"]["encoder_hidden_states"][1:]
    batch = {
        "sample": torch.randn(2, 4, 2, 2, 2),
        "cond": {"encoder_hidden_states": torch.randn(2, *width)},
        "key": ["a", "b"],
    }
    trainer = quiet_trainer(tmp_path, [], 1)
    trainer.fit(video, DataLoader([batch], batch_size=None), weights_only=True)  # type: ignore[arg-type]
    weights = video.student.state_dict()
    assert any(not torch.equal(value, wanted[name]) for name, value in weights.items())
    trainer.save_checkpoint(tmp_path / "video.ckpt")
    loaded = load_denoiser(tmp_path / "video.ckpt", "student").denoiser
    assert loaded.sample_shape == (4, 2, 2, 2)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())

    planned = AdversarialPostTraining(str(image), five)
    build_without_weights(planned)
    assert planned.sample_shape == (4, 2, 2, 2)
    assert all(weight.is_meta for weight in planned.student.parameters())


def test_a_start_of_another_network_is_refused() -> None:
    with pytest.raises(FewstepError, match=r"`start` does not fit `teacher`\. This is DiT"):
        AdversarialPostTraining(teacher, video_teacher).configure_model()


def test_a_guidance_range_of_one_value_is_constant_guidance() -> None:
    module = ConsistencyDistillation(teacher, 20, guidance_range=(7.5, 7.5), loss="l2")
    module.configure_model()
    draws = module.draw(digits(), torch_generator(0, "x"))
    assert draws.guidance.tolist() == [7.5] * 6
    assert module.guidance_scale("teacher") == 7.5


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_negative_prompt_takes_the_empty_ones_place(tmp_path: Path, name: str) -> None:
    """Also where the pipeline itself gives zeros."""
    folder = SAVES[name](tmp_path)
    backbone, texts = {}, {}
    for prompt in (None, "blur"):
        found, origin = load_teacher(Pretrained(str(folder), (16, 16), negative_prompt=prompt))
        backbone[prompt] = found.backbone
        texts[prompt] = origin.get("negative_prompt")
    assert texts == {None: None, "blur": "blur"}
    given = TextEncoding(folder).encode(["a", "b"])
    null = {key: network.null_cond(given) for key, network in backbone.items()}
    wanted = TextEncoding(folder).encode(["blur", "blur"])
    assert set(null["blur"]) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(null["blur"][key], value)
        assert not torch.allclose(null[None][key], value)


def test_two_sources_of_the_unconditional_branch_are_refused() -> None:
    with pytest.raises(FewstepError, match="leave one of them out"):
        Pretrained("models/sd15", empty="empty.safetensors", negative_prompt="blur")


# ---------------------------------------------------------------------- Gaussian data

MEAN, STD = 1.5, 0.4


class GaussianFlow(Flow):
    """The exact velocity where data are normal, of mean 1.5 and deviation 0.4."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.0)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        super().forward(x_t, t, class_labels)
        return self.velocity(x_t, t[:, None, None, None] / 1000)

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return dict(cond)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """``-m + V'/2V (x - (1 - t) m)`` with ``V = (1 - t)^2 s^2 + t^2``."""
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


class Straight(GaussianFlow):
    """The mean velocity of the whole way to clean data, which one jump then goes exactly."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * STD**2 + t**2
        return (x - MEAN - STD * (x - (1 - t) * MEAN) / variance.sqrt()) / t


def gaussian(kind: type[GaussianFlow] = GaussianFlow) -> Denoiser:
    return Denoiser(kind().double(), FlowSchedule(), "flow_prediction")


def quantiles(shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers without chance."""
    count = math.prod(shape)
    made = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=made)
    return torch.special.ndtri((order.double() + 0.5) / count).view(shape)


def test_without_a_first_stage_the_generator_gives_the_datas_mean_for_all_noise() -> None:
    """Which is why there is one: pure noise tells a diffusion model nothing about the sample."""
    module = AdversarialPostTraining(gaussian, gaussian)
    module.configure_model()
    network: Any = module.student.backbone
    made = module.generate(quantiles((50, 1, 8, 8)), digits(50)["cond"])
    assert network.times == [1000.0]
    assert float(made.mean()) == pytest.approx(MEAN, abs=1e-14)
    assert float(made.std()) < 1e-14


@pytest.mark.parametrize(
    ("steps", "figure"), [(8, 0.0755), (16, 0.0394), (32, 0.0202), (64, 0.0102), (128, 0.0051)]
)
def test_the_teachers_steps_miss_the_samples_of_its_noise_by_the_known_figures(
    steps: int, figure: float
) -> None:
    """The flow takes noise ``z`` to ``m + s z``; Euler's steps get there at first order."""
    denoiser, z = gaussian(), quantiles((50, 1, 8, 8))
    times = denoiser.schedule.spaced_times(steps)
    arrived = ode_sample(denoiser, z, digits(50)["cond"], times)
    error = (arrived - MEAN - STD * z).square().mean().sqrt()
    assert float(error) == pytest.approx(figure, rel=0.015)


def first_stage(points: int) -> ConsistencyDistillation:
    module = ConsistencyDistillation(gaussian, points, loss="l2")
    module.configure_model()
    module.student = gaussian(Straight)
    return module.double()


def everywhere(points: int) -> tuple[Batch, ConsistencyDraws]:
    """Data with noise, as often at each point of the grid."""
    each = 20
    index = torch.arange(points).repeat_interleave(each)
    size = len(index)
    noise, data = quantiles((2 * size, 1, 8, 8)).chunk(2)
    batch = digits(size)
    batch["sample"] = MEAN + STD * data
    draws = ConsistencyDraws(index, noise, torch.ones(size), torch.zeros(size).bool())
    return batch, draws


@pytest.mark.parametrize(
    ("points", "figure"), [(8, 1.9e-4), (16, 1.2e-5), (32, 7.7e-7), (64, 4.8e-8), (128, 3.0e-9)]
)
def test_the_exact_consistency_function_leaves_only_the_error_of_the_teachers_step(
    points: int, figure: float
) -> None:
    """Whose square is of fourth order."""
    module = first_stage(points)
    pair = module.pair(*everywhere(points))
    assert float(module.consistency_loss(pair)) == pytest.approx(figure, rel=0.03)


def test_the_consistency_function_is_the_identity_on_clean_data() -> None:
    module = first_stage(8)
    x, cond = quantiles((4, 1, 8, 8)), digits(4)["cond"]
    clean = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(module.consistency(flow().double(), x, clean, clean, cond), x)
