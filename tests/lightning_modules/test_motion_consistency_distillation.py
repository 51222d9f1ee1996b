"""MCM against its limiting cases, the exact fixed point of Gaussian videos, and whose gradient."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.contracts import Batch
from fewstep.diffusion import Backbone, Denoiser, TimeGrid, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import VideoDiT
from fewstep.networks.frames import PooledText, TextCondition
from fewstep.networks.motion import FrameDifference, LearnableHead, RawMotion
from fewstep.seeding import torch_generator
from lightning_modules import (
    ConsistencyDistillation,
    MotionConsistencyDistillation,
    Pretrained,
)
from lightning_modules.motion_consistency_distillation import MotionDraws

from captioned import PROMPTS, Captioned
from rings import quiet_trainer
from tiny_pipelines import WIDTH, save_text_model
from tiny_transformers import SAVES
from training_runs import adversary, video_teacher

SIZE = 6


def built(**options: Any) -> MotionConsistencyDistillation:
    """A method with its roles, of the same first weights each time."""
    torch.manual_seed(3)
    given = {"teacher": video_teacher, "generated_share": 0.0, "num_grid_points": 20, **options}
    module = MotionConsistencyDistillation(**given)
    module.configure_model()
    return module


def videos(generated: list[bool] | None = None, images: int = 0) -> Batch:
    draws = torch.Generator().manual_seed(0)
    sample = torch.randn(SIZE, 1, 3, 8, 8, generator=draws)
    labels = torch.arange(SIZE)
    batch: Batch = {
        "sample": sample,
        "cond": {"class_labels": labels},
        "key": [str(number) for number in range(SIZE)],
        "pixels": sample,
        "generated": generated or [False] * SIZE,
    }
    if images:
        pictures = torch.randn(images * SIZE, 1, 8, 8, generator=draws)
        cond = {"class_labels": labels.repeat_interleave(images)}
        batch["images"] = {"sample": pictures, "cond": cond, "key": ["x"] * len(pictures)}
    return batch


def draw(module: ConsistencyDistillation, batch: Batch, seed: int = 1) -> Any:
    return module.draw(batch, torch_generator(seed, "test"))


def gradient_of(module: ConsistencyDistillation, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.student.parameters())))


# ---------------------------------------------------------------------- limiting cases


@pytest.mark.parametrize("motion", [RawMotion, LearnableHead])
@pytest.mark.parametrize("weighting", ["jump", "velocity"])
def test_without_its_three_ideas_it_is_video_lcm_bit_for_bit(motion: Any, weighting: str) -> None:
    """A learnable head is the identity until its first update."""
    ours = built(motion=motion(), weighting=weighting)
    plain = ConsistencyDistillation(video_teacher, 20, weighting=weighting)
    plain.configure_model()
    batch = videos()
    (step,) = ours.updates(batch, draw(ours, batch))
    (expected,) = plain.updates(batch, draw(plain, batch))
    assert torch.equal(step.loss, expected.loss)
    found, wanted = gradient_of(ours, step.loss), gradient_of(plain, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_video_of_one_frame_is_an_image() -> None:
    """A network that works element by element cannot tell them apart, and so neither may we."""

    class Pointwise(Backbone):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.config, self.sample_shape = {}, shape
            self.slope = nn.Parameter(torch.tensor(0.3))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            scale = self.slope * (1 + t / 1000)
            return torch.sin(x_t * scale.view(-1, *[1] * (x_t.ndim - 1)))

    def teacher(shape: tuple[int, ...]) -> Any:
        return lambda: Denoiser(Pointwise(shape), VPSchedule(), "epsilon")

    ours = built(teacher=teacher((1, 1, 8, 8)), motion=RawMotion())
    plain = ConsistencyDistillation(teacher((1, 8, 8)), 20)
    plain.configure_model()
    batch = videos()
    one: Batch = {**batch, "sample": batch["sample"][:, :, :1], "cond": {}}
    image: Batch = {**batch, "sample": one["sample"][:, :, 0], "cond": {}}
    (step,) = ours.updates(one, draw(ours, one))
    (expected,) = plain.updates(image, draw(plain, image))
    assert torch.equal(step.loss, expected.loss)


def test_differences_of_a_single_frame_are_refused() -> None:
    def teacher() -> Denoiser:
        network = VideoDiT(8, 1, 1, patch_size=4, num_layers=1, num_heads=1, head_dim=12)
        return Denoiser(network, VPSchedule(), "v_prediction")

    with pytest.raises(FewstepError, match="at least 2, not 1"):
        built(teacher=teacher, motion=FrameDifference())


# ---------------------------------------------------------------------- the exact fixed point


class FrameMatrices(Backbone):
    """``x0 = A_i x`` over frames, a matrix a grid time."""

    def __init__(self, grid: TimeGrid, matrices: Tensor) -> None:
        super().__init__()
        self.config = {}
        self.sample_shape = (1, matrices.shape[-1], 1, 1)
        self.times = grid.times.home
        self.matrices = nn.Parameter(matrices.clone())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        index = torch.searchsorted(self.times, t.clamp_min(self.times[0]).double())
        return torch.einsum("bfg,bcghw->bcfhw", self.matrices[index], x_t)


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


FRAMES, POINTS = 4, 10


def gaussian_video() -> tuple[TimeGrid, Tensor, Tensor]:
    """Grid, the exact denoiser's matrices and the fixed point of its grid steps, as ``x0`` maps.

    Frames are a static appearance and AR(1) motion: ``C = 0.5 + 0.3 * 0.8^|f - g|``.
    """
    schedule = VPSchedule()
    grid = TimeGrid.uniform(schedule, POINTS)
    times, previous = grid.times.home, grid.previous.home
    gaps = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs()
    covariance = 0.5 + 0.3 * 0.8**gaps
    identity = torch.eye(FRAMES)
    denoise, reach = [], []
    for number in range(POINTS):
        alpha, sigma = schedule.alpha(times[number]), schedule.sigma(times[number])
        exact = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * identity)
        denoise.append(exact)
        # One DDIM step to the previous point, then on from there.
        a, s = schedule.alpha(previous[number]), schedule.sigma(previous[number])
        step = a * exact + s * (identity - alpha * exact) / sigma
        reach.append((reach[-1] if reach else identity) @ step)
    # The jump to the end e of x0 map X is (a_e - s_e alpha / sigma) X + s_e / sigma.
    end = previous[0]
    a, s = schedule.alpha(end), schedule.sigma(end)
    maps = []
    for number in range(POINTS):
        alpha, sigma = schedule.alpha(times[number]), schedule.sigma(times[number])
        maps.append((reach[number] - s / sigma * identity) / (a - s * alpha / sigma))
    return grid, torch.stack(denoise), torch.stack(maps)


def gaussian_method(motion: Any) -> tuple[MotionConsistencyDistillation, Tensor]:
    grid, denoise, maps = gaussian_video()

    def teacher() -> Denoiser:
        return Denoiser(FrameMatrices(grid, denoise), VPSchedule(), "sample")

    module = built(
        teacher=teacher, motion=motion, num_grid_points=POINTS, loss="l2", ema_decay=None
    )
    module.teacher.double()  # frozen roles are kept in float32
    with torch.no_grad():
        module.teacher.backbone.matrices.copy_(denoise)  # type: ignore[operator]
    return module, maps


def loss_of(module: MotionConsistencyDistillation, seed: int = 0, size: int = 256) -> Tensor:
    generator = torch_generator(seed, "train")
    sample = torch.randn(size, 1, FRAMES, 1, 1, generator=generator)
    batch: Batch = {"sample": sample, "cond": {}, "key": [], "generated": [False] * size}
    (step,) = module.updates(batch, module.draw(batch, generator))
    return step.loss


@pytest.mark.parametrize("motion", [RawMotion, FrameDifference])
def test_the_composition_of_the_teachers_steps_is_the_fixed_point(
    motion: Any, float64: None
) -> None:
    module, maps = gaussian_method(motion())
    assert float(loss_of(module)) > 1e-5
    with torch.no_grad():
        module.student.backbone.matrices.copy_(maps)  # type: ignore[operator]
    assert float(loss_of(module)) < 1e-24
    # A still image added to what the student predicts: differences do not see it.
    with torch.no_grad():
        module.student.backbone.matrices += 0.1  # type: ignore[operator]
    assert (float(loss_of(module)) < 1e-24) == (motion is FrameDifference)


@pytest.mark.parametrize(
    "motion", [pytest.param(RawMotion, marks=pytest.mark.slow), FrameDifference]
)
def test_training_finds_the_fixed_point_up_to_what_the_representation_leaves_free(
    motion: Any, float64: None
) -> None:
    module, maps = gaussian_method(motion())
    student = module.student.backbone.matrices
    optimizer = torch.optim.Adam([student], lr=0.02)  # type: ignore[list-item]
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for update in range(800):
        optimizer.zero_grad()
        loss_of(module, update, size=128).backward()
        optimizer.step()
        decay.step()
    error = (student - maps).detach()
    assert float(error.diff(dim=1).abs().max()) < 2e-3
    assert (float(error.abs().max()) < 2e-3) == (motion is RawMotion)


# ---------------------------------------------------------------------- the adversary


def test_the_adversarial_gradient_reaches_the_chosen_frames_and_no_other() -> None:
    module = built(motion=RawMotion(), adversary=adversary(num_frames=2))
    batch = videos()
    draws = draw(module, batch)
    pair = module.pair(batch, draws)
    prediction = pair.student.detach().requires_grad_(True)
    looks = module._look_at_fakes(pair._replace(student=prediction), batch, draws)
    scores = module.discriminator.score(module.features.tokens(looks.prepared), looks.cond)
    (gradient,) = torch.autograd.grad(scores.sum(), prediction)
    seen = gradient.abs().sum((1, 3, 4)) > 0
    chosen = torch.zeros_like(seen).scatter_(1, draws.fake_frames, True)
    assert torch.equal(seen, chosen)
    assert int(chosen.sum()) == 2 * SIZE


def test_each_loss_trains_its_own_roles_only() -> None:
    module = built(adversary=adversary(penalty=0.1))
    batch = videos()
    steps = module.updates(batch, draw(module, batch))
    student = next(steps)
    assert (student.role, student.also) == ("student", ("motion",))
    own = [*module.student.parameters(), *module.motion.parameters()]
    student.loss.backward(inputs=own)
    assert all(p.grad is None for p in module.discriminator.parameters())
    last = module.motion.residual[-1]
    assert [p.grad.abs().sum() > 0 for p in last.parameters() if p.grad is not None] == [True, True]
    for parameter in own:
        parameter.grad = None
    discriminator = next(steps)
    assert discriminator.role == "discriminator"
    discriminator.loss.backward()
    assert all(p.grad is None for p in own)
    assert any(p.grad is not None for p in module.discriminator.parameters())
    assert all(not p.requires_grad for p in module.motion_average.parameters())


def test_a_strong_adversary_moves_the_loss_along_its_own_direction() -> None:
    """Twice the weight adds the adversary's loss once more."""
    batch = videos()
    losses = []
    for weight in (1.0, 2.0):
        module = built(motion=RawMotion(), adversary=adversary(weight=weight))
        step = next(module.updates(batch, draw(module, batch)))
        losses.append((step.loss, step.logs["adversarial"]))
    (once, adversarial), (twice, _) = losses
    torch.testing.assert_close(twice - once, adversarial)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_real_pictures_come_from_the_images_beside_the_videos(each: int) -> None:
    module = built(adversary=adversary(real="images", penalty=0.1, augment=()))
    batch = videos(images=each)
    draws = draw(module, batch)
    real = module._look_at_reals(batch, draws)
    assert torch.equal(real.prepared[:, :1], batch["images"]["sample"])
    assert [step.role for step in module.updates(batch, draws)] == ["student", "discriminator"]


def test_real_frames_are_those_of_the_videos_also_where_the_student_makes_its_own() -> None:
    module = built(adversary=adversary(augment=()), generated_share=1.0)
    batch = videos([True] * SIZE)
    draws = draw(module, batch)
    real = module._look_at_reals(batch, draws).prepared.unflatten(0, (SIZE, -1))
    for row in range(SIZE):
        for place, frame in enumerate(draws.real_frames[row].tolist()):
            assert torch.equal(real[row, place, :1], batch["sample"][row, :, frame])


def test_missing_images_and_too_few_frames_are_named() -> None:
    module = built(adversary=adversary(real="images"))
    with pytest.raises(FewstepError, match="VideosWithImages"):
        draw(module, videos())
    module = built(adversary=adversary(num_frames=4))
    with pytest.raises(FewstepError, match="looks at 4 frames of each video and they have 3"):
        draw(module, videos())


def test_a_precision_in_which_the_adversarys_gradient_is_lost_is_refused() -> None:
    with pytest.raises(FewstepError, match="encoder_precision: bfloat16, or float32"):
        built(adversary=adversary(), encoder_precision="float16")
    built(encoder_precision="float16")


# ---------------------------------------------------------------------- mixed trajectories


def test_generated_starts_are_the_students_one_step_samples() -> None:
    module = built(generated_share=0.5)
    chosen = [True, False, False, True, True, False]
    batch = videos(chosen)
    draws = draw(module, batch)
    starts = module._starts(batch, draws)
    assert not starts.requires_grad
    t = module.phases.grid.times.home[-1].expand(SIZE)
    with torch.no_grad():
        made = module.student(draws.start, t, batch["cond"]).x0
    for row, generated in enumerate(chosen):
        expected = made if generated else batch["sample"]
        torch.testing.assert_close(starts[row], expected[row], rtol=1e-5, atol=1e-6)


def test_no_generated_trajectory_costs_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(generated_share=0.5)
    batch = videos()
    draws = draw(module, batch)
    monkeypatch.setattr(module.student, "forward", None)
    assert module._starts(batch, draws) is batch["sample"]


class Coins:
    """Stands for a trainer of so many ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size


def tossed(module: Any, world: int, rank: int, number: int, monkeypatch: Any) -> list[bool]:
    monkeypatch.setattr(type(module), "trainer", property(lambda _: Coins(world)))
    monkeypatch.setattr(type(module), "global_rank", property(lambda _: rank))
    encoded: Batch = module._encoded(videos(), "train-latents", number)
    return encoded["generated"]


def test_coins_are_fair_and_the_same_on_however_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(generated_share=0.25)
    coins = [c for n in range(200) for c in tossed(module, 1, 0, n, monkeypatch)]
    assert sum(coins) / len(coins) == pytest.approx(0.25, abs=4 * (0.1875 / len(coins)) ** 0.5)
    both = [c for rank in (0, 1) for c in tossed(module, 2, rank, 7, monkeypatch)]
    assert both[:SIZE] == tossed(module, 1, 0, 7, monkeypatch)
    assert both[SIZE:] != both[:SIZE]


def test_all_generated_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(generated_share=1.0)
    assert "artefacts" in caplog.text
    with pytest.raises(FewstepError, match=r"0 to 1, not 1\.5"):
        built(generated_share=1.5)


# ---------------------------------------------------------------------- latents


@pytest.mark.parametrize(
    ("share", "encodings"), [(0.0, [2, 2]), pytest.param(1.0, [], marks=pytest.mark.slow)]
)
def test_only_videos_that_trajectories_start_from_are_encoded(
    share: float, encodings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SAVES["modelscope"](tmp_path / "pipeline")
    module = MotionConsistencyDistillation(
        str(folder),
        adversary=adversary(condition=None),
        generated_share=share,
        num_grid_points=20,
    )
    module.configure_model()
    assert module.companions is not None
    codec, seen = module.companions.codec, []
    original = codec.distribution
    monkeypatch.setattr(codec, "distribution", lambda x: seen.append(len(x)) or original(x))
    _, frames, height, width = module.student.sample_shape
    factor = codec.factors[1]
    pixels = torch.rand(2, 3, frames, height * factor, width * factor) * 2 - 1
    before = {n: p.clone() for n, p in module.student.named_parameters()}
    quiet_trainer(tmp_path, [], 2).fit(module, Captioned(pixels), weights_only=True)
    assert seen == encodings
    assert any(not torch.equal(p, before[n]) for n, p in module.student.named_parameters())


def with_pictures(told: dict[str, Any]) -> Captioned:
    """Videos and twice as many pictures, all with captions of their own."""
    data = Captioned(torch.rand(2, 3, 3, 16, 16) * 2 - 1)
    pictures = torch.rand(4, 3, 16, 16) * 2 - 1
    beside: Any = {"sample": pictures, "cond": {}, "key": ["x"] * 4, **told}
    data.batch["images"] = beside
    return data


def told_by(condition: Any, folder: Path) -> MotionConsistencyDistillation:
    return MotionConsistencyDistillation(
        Pretrained(str(SAVES["modelscope"](folder / "pipeline")), (16, 16), 3),
        adversary=adversary(condition=condition, real="images"),
        num_grid_points=20,
    )


@pytest.mark.parametrize("condition", ["pooled", "captions", "null"])
def test_captions_of_pictures_are_encoded_if_the_heads_are_told_of_them_so(
    condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["a", "b c", "d", "e"]
    if condition == "captions":
        save_text_model(tmp_path / "clip")
    made = {"pooled": PooledText(WIDTH), "captions": TextCondition(str(tmp_path / "clip"))}
    module = told_by(made.get(condition), tmp_path)
    module.configure_model()
    assert module.companions is not None
    encode, encoded, looks = module.companions.conditions, [], []
    look = module._look_at_reals

    def seen(prompts: list[str], device: torch.device) -> Any:
        encoded.append(prompts)
        return encode(prompts, device)

    monkeypatch.setattr(module.companions, "conditions", seen)
    monkeypatch.setattr(module, "_look_at_reals", lambda *a: looks.append(look(*a)) or looks[-1])
    data = with_pictures({"prompt": captions})
    quiet_trainer(tmp_path, [], 1).fit(module, data, weights_only=True)
    assert encoded == ([PROMPTS[:2], captions] if condition == "pooled" else [PROMPTS[:2]])
    (real,) = looks
    if condition == "pooled":
        expected = encode(captions, torch.device("cpu"))["encoder_hidden_states"].mean(1)
        torch.testing.assert_close(real.cond, expected)
    else:
        assert real.cond is None or real.cond.shape == (4, 12)


@pytest.mark.parametrize("given", ["nothing", "embeddings"])
def test_pictures_that_heads_can_be_told_nothing_of_are_named(given: str, tmp_path: Path) -> None:
    """Shards that were encoded have no captions."""
    condition: Any = PooledText(WIDTH)
    told: dict[str, Any] = {}
    message = "looks for 'encoder_hidden_states' and the batch has no conditions"
    if given == "embeddings":
        save_text_model(tmp_path / "clip")
        condition = TextCondition(str(tmp_path / "clip"))
        told = {"cond": {"encoder_hidden_states": torch.zeros(4, 77, WIDTH)}}
        message = r"is to read captions and the batch has none.*images beside videos.*PooledText"
    module = told_by(condition, tmp_path)
    data = with_pictures(told)
    with pytest.raises(FewstepError, match=message):
        quiet_trainer(tmp_path, [], 1).fit(module, data, weights_only=True)


def test_encoded_videos_without_captions_cannot_be_told_of_by_captions(tmp_path: Path) -> None:
    save_text_model(tmp_path / "clip")
    module = told_by(TextCondition(str(tmp_path / "clip")), tmp_path)
    latents, text = torch.randn(2, 4, 3, 8, 8), torch.zeros(2, 77, WIDTH)
    data = Captioned(latents, {"encoder_hidden_states": text})
    assert module.adversary is not None
    module.adversary.real = "videos"
    with pytest.raises(FewstepError, match=r"the batch has none.*Give the data a `prompt`"):
        quiet_trainer(tmp_path, [], 1).fit(module, data, weights_only=True)


def test_alarms_watch_a_head_that_can_collapse() -> None:
    (alarm,) = built().alarms()
    assert alarm.value == "train/motion_variance"
    assert built(motion=RawMotion()).alarms() == []


def test_draws_split_with_their_samples() -> None:
    module = built(adversary=adversary(), generated_share=0.5)
    batch = videos()
    draws = draw(module, batch)
    assert isinstance(draws, MotionDraws)
    part = draws.rows(slice(2, 4))
    assert torch.equal(part.fake_look, draws.fake_look[2:4])
    assert len(part.start) == 2


def test_a_heads_optimiser_is_the_students_unless_told_otherwise() -> None:
    module = built()
    assert module.make_optimizer["motion"] is module.make_optimizer["student"]


@pytest.mark.parametrize(("decay", "follows"), [(0.0, True), (1.0, False)])
def test_the_targets_representation_is_the_average_of_the_students(
    decay: float, follows: bool
) -> None:
    module = built(motion_ema_decay=decay)
    before = [p.clone() for p in module.motion_average.parameters()]
    with torch.no_grad():
        for parameter in module.motion.parameters():
            parameter.add_(1.0)
    module.after_update()
    now, then = module.motion_average.parameters(), module.motion.parameters()
    for average, own, old in zip(now, then, before, strict=True):
        assert torch.equal(average, own if follows else old)


class FakeCodec:
    """Counts what it is asked for."""

    encodes_videos = False

    def __init__(self) -> None:
        self.trips = 0

    def decode_frames(self, video: Tensor, frames: Tensor, checkpointed: bool = False) -> Tensor:
        return video.new_ones(*frames.shape, 1, 8, 8)

    def round_trip(self, pictures: Tensor) -> Tensor:
        self.trips += 1
        return pictures


@pytest.mark.parametrize("encoded", [True, False])
def test_real_frames_bear_the_vaes_marks_once(encoded: bool) -> None:
    """Frames that were decoded from latents have been through it already."""
    judge, codec, batch = adversary(round_trip=True, augment=()), FakeCodec(), videos()
    batch["pixels"] = batch["sample"] if encoded else torch.zeros(SIZE, 1, 3, 16, 16)
    frames = torch.zeros(SIZE, 2, dtype=torch.long)
    uniforms = torch.rand(SIZE, 2, 7)
    judge.reals(batch, frames, uniforms, codec)  # type: ignore[arg-type]
    assert codec.trips == (0 if encoded else 1)


def test_frames_are_counted_in_pixels_where_a_vae_joins_them(tmp_path: Path) -> None:
    folder = SAVES["wan"](tmp_path / "pipeline")
    source = Pretrained(str(folder), size=(16, 16), frames=5)
    module = MotionConsistencyDistillation(
        source, motion=RawMotion(), adversary=adversary(condition=None), num_grid_points=20
    )
    module.configure_model()
    assert module.sample_shape[1] == 2
    assert module.companions is not None
    assert module.companions.pixel_frames(2) == 5
    batch: Batch = {"sample": torch.zeros(64, *module.sample_shape), "cond": {}, "key": []}
    assert int(draw(module, batch).fake_frames.max()) == 4
