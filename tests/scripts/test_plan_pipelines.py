"""Plans of methods on diffusers pipelines, and of what judges frames of their videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import Shards, VideosWithImages
from datamodules.fields import Caption, ClassLabel, Images, Videos
from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import VideoDiT
from fewstep.networks.frames import (
    ConvolutionFeatures,
    DINOv2Features,
    FrameDiscriminator,
    FrozenFeatures,
    PooledText,
    TextCondition,
)
from lightning_modules import (
    ConsistencyDistillation,
    FrameAdversary,
    MotionConsistencyDistillation,
    Pretrained,
)
from scripts.plan import Plan, plan_of
from scripts.plan.step import flop_counter

from tiny_pipelines import WIDTH, save_stable_diffusion
from tiny_transformers import SAVES
from training_runs import adversary

pytestmark = pytest.mark.threads

SIZE, FRAMES, PICTURES = 4, 3, 2
VIT_G = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"


def shards(field: Any, size: int, condition: Any) -> Shards:
    return Shards("none.tar", "none.tar", size, field, condition)


def videos_and_images(condition: Any, side: int) -> VideosWithImages:
    clips, pictures = Videos(FRAMES, side, stride=1), Images(side)
    return VideosWithImages(
        shards(clips, SIZE, condition), shards(pictures, PICTURES * SIZE, condition)
    )


def test_text_encoders_say_the_shape_of_text_and_keep_their_weights(tmp_path: Path) -> None:
    base = save_stable_diffusion(tmp_path / "sd")
    method = ConsistencyDistillation(str(base), guidance_range=(2.0, 3.0))
    plan = plan_of(method, shards(Images(16), 2, {"prompt": Caption()}))
    assert plan.notes == []
    assert plan.step is not None
    assert plan.step.flops > 0


def video_teacher() -> Denoiser:
    network = VideoDiT(8, FRAMES, 1, patch_size=4, num_layers=2, num_heads=2, head_dim=12)
    return Denoiser(network, VPSchedule(), "v_prediction")


def judged_by(judge: FrameAdversary, **options: Any) -> MotionConsistencyDistillation:
    given = {"generated_share": 0.0, "num_grid_points": 20, **options}
    return MotionConsistencyDistillation(video_teacher, adversary=judge, **given)


def test_a_plan_counts_what_a_step_with_an_adversary_does() -> None:
    judge = adversary(real="images", penalty=0.1)
    data = videos_and_images({"class_labels": ClassLabel(10)}, 8)
    plan = plan_of(judged_by(judge), data)
    assert plan.notes == []
    names = ["teacher", "student", "motion", "motion_average", "discriminator", "features", "ema"]
    assert [role.role for role in plan.roles] == names
    real = judged_by(judge)
    real.configure_model()
    labels = {"class_labels": torch.arange(SIZE * PICTURES)}
    batch: Batch = {
        "sample": torch.randn(SIZE, *real.sample_shape),
        "cond": {"class_labels": torch.arange(SIZE)},
        "key": [],
        "generated": [False] * SIZE,
        "images": {"sample": torch.randn(SIZE * PICTURES, 1, 8, 8), "cond": labels, "key": []},
    }
    with flop_counter() as counted:
        for update in real.updates(batch, real.draw(batch, torch.Generator())):
            roles = (update.role, *update.also)
            update.loss.backward(inputs=[p for r in roles for p in real._parameters_of(r)])
    assert plan.step is not None
    assert plan.step.flops == counted.get_total_flops() > 0


def test_generated_trajectories_cost_their_share() -> None:
    flops = []
    for share in (0.0, 0.5, 1.0):
        data = shards(Videos(FRAMES, 8, stride=1), SIZE, {"class_labels": ClassLabel(10)})
        step = plan_of(judged_by(adversary(), generated_share=share), data).step
        assert step is not None
        flops.append(step.flops)
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0


def of_modelscope(folder: Path, **options: Any) -> Plan:
    """A plan whose adversary's networks are not here."""
    base = SAVES["modelscope"](folder / "base")
    given: dict[str, Any] = {"features": DINOv2Features(), "condition": TextCondition(VIT_G)}
    method = MotionConsistencyDistillation(
        Pretrained(str(base), (16, 16), FRAMES),
        adversary=FrameAdversary(**{**given, **options}),
        num_grid_points=20,
        ema_decay=None,
    )
    beside = options.get("real") == "images"
    data = videos_and_images({"prompt": Caption()}, 16)
    return plan_of(method, data if beside else data.videos)


@pytest.mark.slow
def test_networks_that_are_not_here_have_their_published_sizes(tmp_path: Path) -> None:
    plan = of_modelscope(tmp_path)
    roles = {role.role: role for role in plan.roles}
    assert roles["features"].parameters == 22_056_576
    assert roles["features"].trainable == 0
    heads = FrameDiscriminator([384] * 4, cond_dim=1024)
    assert roles["discriminator"].parameters == sum(p.numel() for p in heads.parameters())
    assert plan.step is not None
    there, text_encoder, decoder = plan.notes
    assert "'facebook/dinov2-small' is not here yet" in there
    assert f"'{VIT_G}', is not counted" in text_encoder
    assert "VAE's own weights (0." in decoder


@pytest.mark.slow
@pytest.mark.parametrize("real", ["videos", "images"])
def test_frames_are_decoded_with_gradient_which_checkpointing_makes_lighter(
    tmp_path: Path, real: Any
) -> None:
    saved = []
    for checkpointed in (False, True):
        plan = of_modelscope(
            tmp_path,
            features=ConvolutionFeatures(widths=[4, 8]),
            condition=PooledText(WIDTH),
            real=real,
            penalty=0.1,
            checkpoint_decoder=checkpointed,
        )
        assert plan.step is not None, plan.notes
        saved.append(plan.step.saved["student"])
    assert saved[1] < saved[0]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"features": DINOv2Features("no/such")}, "no/such"),
        ({"condition": TextCondition("x/y")}, "x/y"),
    ],
)
def test_networks_that_nobody_knows_are_one_message(
    tmp_path: Path, options: dict[str, FrozenFeatures | TextCondition], missing: str
) -> None:
    with pytest.raises(FewstepError, match=f"There is no network at '{missing}'"):
        of_modelscope(tmp_path, **options)
