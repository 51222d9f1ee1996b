"""Any method's samples can be steered, and stay what they were where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import Denoiser, Guided, VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    ClassLabel,
    DiffAugment,
    Energy,
    Guidance,
    MapDistance,
    Normalised,
    PictureNetwork,
    Scheduled,
    Target,
    Window,
    augmented_polyak,
    freedom,
    guided_sample,
)
from fewstep.guidance.described import described
from fewstep.guidance.noise import NoiseOptimisation
from fewstep.networks.mixture import RingMixture
from fewstep.seeding import torch_generator
from lightning_modules import FewStepModule, Steering, TrainingFreeGuidance
from lightning_modules.chains import PLAIN_ODE, chain_of
from lightning_modules.roles import Pretrained
from lightning_modules.steered import Steered

from tiny_transformers import SAVES, save_dit
from training_runs import method

COND = {"class_labels": torch.arange(6) % 10}
NAMES = ["teacher", "lcm", "phased", "apt"]


def noise() -> Tensor:
    return torch.stack(
        [torch.randn(1, 8, 8, generator=torch_generator(0, "n", n)) for n in range(6)]
    )


def generators(rows: range = range(6)) -> list[torch.Generator]:
    return [torch_generator(0, "sampler", n) for n in rows]


def classifier() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return network.eval()


ENERGY = ClassLabel(classifier())
STRONG = freedom(ENERGY, 3.0)


def built(name: str, **options: object) -> FewStepModule:
    module = method(name, ema_decay=None, **options)
    module.configure_model()
    return module.eval()


def steps_of(name: str) -> int:
    return 2 if name != "teacher" else 4


def sampled(module: FewStepModule, steps: int, steering: Steering | None = None) -> Tensor:
    if steering is not None:
        module.steer(steering)
    return module.sample(noise(), COND, steps, generators())


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_steered_along_its_own_chain(name: str) -> None:
    """With a strength of zero a guided walk is the method's own sampler, up to rounding."""
    module, steps = built(name), steps_of(name)
    plain = sampled(module, steps)
    idle = Steering(Guidance(ENERGY, Scheduled(0.0)), unconditional=False)
    torch.testing.assert_close(sampled(module, steps, idle), plain, atol=2e-5, rtol=1e-4)
    guided = sampled(module, steps, replace(idle, guidance=STRONG))
    assert (guided - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_steering_without_guidance_changes_no_bit(name: str) -> None:
    module, steps = built(name), steps_of(name)
    plain = sampled(module, steps)
    assert torch.equal(sampled(module, steps, Steering(unconditional=False)), plain)


def test_steered_samples_are_those_of_guided_sample_itself() -> None:
    module = built("teacher")
    steering = Steering(augmented_polyak(ENERGY, 0.1, DiffAugment(3), cap=0.2))
    found = sampled(module, 4, steering)
    chain = chain_of(PLAIN_ODE, VPSchedule(), 4)
    null = {"class_labels": torch.full((6,), 10)}
    assert steering.guidance is not None
    wanted = guided_sample(
        Guided(module.student, 1.0),
        noise(),
        null,
        chain.times,
        steering.guidance,  # type: ignore[arg-type]
        COND["class_labels"],
        generators(),
        chain.base(VPSchedule()),
    )
    assert torch.equal(found, wanted.samples)


def test_the_network_is_told_no_class_unless_it_should_be() -> None:
    module = built("teacher")
    blind = sampled(module, 4, Steering(None))
    other = {"class_labels": COND["class_labels"].flip(0)}
    assert torch.equal(module.sample(noise(), other, 4, generators()), blind)
    module.steer(Steering(None, unconditional=False))
    assert not torch.equal(module.sample(noise(), COND, 4, generators()), blind)


def test_a_sample_depends_on_no_batch_mate() -> None:
    module = built("lcm")
    steering = Steering(augmented_polyak(ENERGY, 0.1, DiffAugment(3), cap=0.2))
    whole = sampled(module, 2, steering)
    parts = [
        module.sample(noise()[rows], {"class_labels": COND["class_labels"][rows]}, 2, generators(n))
        for rows, n in ((slice(0, 4), range(4)), (slice(4, 6), range(4, 6)))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)


def test_costs_are_what_was_evaluated() -> None:
    module = built("lcm")
    calls: list[int] = []
    module.student.backbone.register_forward_hook(lambda *_: calls.append(1))
    inner = Guidance(ENERGY, Scheduled(0.1), inner_steps=2)
    sampled(module, 2, Steering(inner))
    cost = module.sampling_cost(2)
    assert cost["denoiser_evaluations"] == len(calls) == 2 * 3
    assert cost["denoiser_gradients"] == 2 * 2
    assert cost["seconds"] > 0
    assert module.sampling_evaluations(2) == 6
    assert module.sampling_evaluations(4) == 4  # not sampled yet


def test_classifier_free_guidance_counts_twice() -> None:
    module = built("teacher", sampling_guidance=2.0)
    sampled(module, 4, Steering(STRONG, unconditional=False))
    assert module.sampling_evaluations(4) == 8
    module.steer(Steering(STRONG))
    sampled(module, 4)
    assert module.sampling_evaluations(4) == 4  # unconditional: there is no second pass


def test_initial_noise_can_be_optimised_instead() -> None:
    module = built("lcm")
    plain = sampled(module, 1, Steering(None))
    search = NoiseOptimisation(ENERGY, Scheduled(5.0), iterations=3)
    better = sampled(module, 1, Steering(search))
    before, after = (ENERGY(x, COND["class_labels"]) for x in (plain, better))
    assert (after <= before + 1e-6).all()
    assert after.mean() < before.mean() - 0.01


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("class_label", "steering.target is 'class_label'.*Did you mean 'class_labels'"),
        ("prompt", "ClassLabel reads no captions"),
    ],
)
def test_data_that_lack_what_is_wanted_are_refused(target: str, message: str) -> None:
    module = built("teacher")
    with pytest.raises(FewstepError, match=message):
        sampled(module, 4, Steering(STRONG, target))


def test_a_steering_is_recorded_in_plain_values_that_tell_networks_apart() -> None:
    steering = Steering(STRONG)
    record = described(steering)
    assert record["guidance"]["state"] == {
        "class": "Scheduled",
        "strength": 3.0,
        "weight": "signal",
    }
    assert record["guidance"]["window"]["high"] == "inf"
    assert described(Steering(freedom(ClassLabel(classifier()), 3.0))) == record
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    assert described(Steering(freedom(ClassLabel(other), 3.0))) != record


def test_the_recorded_scale_is_the_one_that_was_sampled_with() -> None:
    module = built("teacher", sampling_guidance=3.0)
    assert module.guidance_scale() == 3
    module.steer(Steering(STRONG, unconditional=False))
    assert module.guidance_scale() == 3
    module.steer(Steering(STRONG))  # told no condition, there is nothing to be free of
    assert module.guidance_scale() == 1
    sampled(module, 4)
    assert module.sampling_evaluations(4) == 4


def test_results_tell_the_steered_networks_apart() -> None:
    def record(std: float) -> dict[str, object]:
        module = TrainingFreeGuidance(
            lambda: Denoiser(RingMixture(VPSchedule(), std=std), VPSchedule(), "epsilon"),
            Steering(),
        )
        module.configure_model()
        return module.steering_record()

    assert record(0.1) == record(0.1) != record(0.2)


def test_steps_that_were_allowed_untrained_are_taken_when_steered_too() -> None:
    module = built("phased", allow_untrained_steps=True)
    plain = sampled(module, 1)
    idle = Steering(Guidance(ENERGY, Scheduled(0.0), inner_steps=1), unconditional=False)
    torch.testing.assert_close(sampled(module, 1, idle), plain, atol=2e-5, rtol=1e-4)
    with pytest.raises(FewstepError, match="allow_untrained_steps: true"):
        sampled(built("phased"), 1, idle)


def test_of_pictures_the_energy_makes_what_it_compares_and_the_network_gets_none() -> None:
    network = torch.nn.Conv2d(3, 2, 3).requires_grad_(False).eval()
    energy = MapDistance(PictureNetwork(network))
    like = torch.rand(6, 1, 8, 8) * 2 - 1
    module, strong = built("teacher"), freedom(energy, 0.5)
    module.steer(Steering(strong, target="like", pictures=True))
    found = module.sample(noise(), {**COND, "like": like}, 4, generators())
    module.steer(Steering(strong, target="maps"))
    maps = {"maps": energy.encode_images(like)}
    chain = chain_of(PLAIN_ODE, VPSchedule(), 4)
    wanted = guided_sample(
        Guided(module.student, 1.0),
        noise(),
        {"class_labels": torch.full((6,), 10)},
        chain.times,
        strong,
        maps["maps"],
        generators(),
        chain.base(VPSchedule()),
    )
    assert torch.equal(found, wanted.samples)
    module.steer(Steering(strong, target="like", pictures=True, unconditional=False))
    assert module.sample(noise(), {**COND, "like": like}, 2).isfinite().all()
    with module.sampling_as(plain=True, counted=False):
        assert module.sample(noise(), {**COND, "like": like}, 2).isfinite().all()
    with pytest.raises(FewstepError, match="a target that names them"):
        Steering(STRONG, target="prompt", pictures=True)
    module.steer(Steering(STRONG, target="like", pictures=True))
    with pytest.raises(FewstepError, match="ClassLabel compares nothing of 'like'"):
        module.sample(noise(), {**COND, "like": like}, 2)


WANTED = COND["class_labels"]


def steered(module: FewStepModule, steps: int, rows: slice = slice(0, 6)) -> Tensor:
    """Some of the samples."""
    cond = {"class_labels": WANTED[rows]}
    return module.sample(noise()[rows], cond, steps, generators(range(6)[rows]))


NOISE_SEARCH = NoiseOptimisation(ENERGY, Scheduled(5.0), iterations=2)
BEST = {
    "plain": Steering(None, candidates=3, ranking=ENERGY),
    "walk": Steering(None, base=DDIM(1.0), candidates=3, ranking=ENERGY),
    "guided": Steering(freedom(ENERGY, 0.5), candidates=3),
    "views": Steering(augmented_polyak(ENERGY, 0.1, DiffAugment(3)), candidates=3),
    "noise": Steering(NOISE_SEARCH, candidates=3),
}


@pytest.mark.parametrize("way", BEST)
def test_the_best_of_several_candidates_is_kept_and_all_are_counted(way: str) -> None:
    module, calls = built("lcm"), list[int]()
    alone = replace(BEST[way], candidates=1, ranking=None)
    module.student.backbone.register_forward_hook(lambda *_: calls.append(1))
    module.steer(alone)
    one, once = steered(module, 2), len(calls)
    module.steer(BEST[way])
    best = steered(module, 2)
    assert len(calls) - once == 3 * once
    assert module.sampling_evaluations(2) == 3 * once
    before, after = ENERGY(one, WANTED), ENERGY(best, WANTED)
    changed = (best - one).flatten(1).abs().amax(1) > 1e-4
    assert 0 < changed.sum() <= 6
    if way != "views":  # which rank by views of their own
        assert (after[changed] < before[changed]).all()
        torch.testing.assert_close(best[~changed], one[~changed], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["plain", "guided", "noise"])
def test_a_best_candidate_depends_on_no_batch_mate(way: str) -> None:
    module = built("lcm")
    module.steer(BEST[way])
    parts = [steered(module, 2, rows) for rows in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(torch.cat(parts), steered(module, 2), atol=1e-5, rtol=1e-4)


def test_what_ranks_candidates_guides_and_is_on_record() -> None:
    several = BEST["plain"]
    guides = several.guides()
    assert guides is not None
    assert [type(network) for network in guides] == [torch.nn.Sequential]
    record = described(several)
    assert (record["candidates"], record["ranking"]["class"]) == (3, "ClassLabel")
    assert described(replace(several, candidates=4)) != record
    assert Steering(None).guides() is None


def test_candidates_that_nothing_ranks_are_refused() -> None:
    with pytest.raises(FewstepError, match="1 or more, not 0"):
        Steering(STRONG, candidates=0)
    with pytest.raises(FewstepError, match=r"set steering\.ranking to an energy"):
        Steering(None, candidates=2)
    with pytest.raises(FewstepError, match="the guidance's own energy does"):
        Steering(STRONG, candidates=2, ranking=ENERGY)
    with pytest.raises(FewstepError, match="and there is one"):
        Steering(None, ranking=ENERGY)


def test_a_sample_without_a_sound_candidate_is_reported_when_asked() -> None:
    """Raised by one rank at once it would leave the others waiting."""

    class Never(Energy):
        def __call__(self, x0: Tensor, target: Target) -> Tensor:
            return x0.flatten(1).sum(1) * torch.nan

    account = Steered(Steering(None, candidates=2, ranking=Never()))
    module = built("lcm")
    chain = chain_of(module.record("student"), module.student.schedule, 2)
    null = {"class_labels": torch.full((6,), 10)}
    draw = Guided(module.student, 1.0), noise(), null, WANTED, chain, generators(), ("student", 2)
    assert account.sample(*draw).isfinite().all()
    assert "None of 2 candidates" in str(account.failure)


class Brightness(Energy):
    """How far the mean of a picture or video is from the number of letters less three."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([len(prompt) - 3.0 for prompt in prompts])

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        assert isinstance(target, Tensor)
        return (x0.flatten(1).mean(1) - target).abs()


BRIGHT = Guidance(Brightness(), Normalised(1.0), window=Window(high=999))


def mean_brightness(module: FewStepModule, prompt: str, labels: Tensor | None = None) -> Tensor:
    start = torch.randn(2, *module.sample_shape, generator=torch_generator(0, "n"))
    cond = None if labels is None else {"class_labels": labels}
    return module.decode(module.sample(start, cond, 4, prompt=[prompt] * 2)).mean()


def test_captions_that_a_network_cannot_read_are_for_the_guide(tmp_path: Path) -> None:
    module = TrainingFreeGuidance(str(save_dit(tmp_path / "dit")), Steering(BRIGHT, "prompt"))
    module.configure_model()
    labels = torch.tensor([1, 2])
    dark, bright = (mean_brightness(module, prompt, labels) for prompt in ("a", "abcde"))
    assert dark < bright - 0.01


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_text_pipelines_are_steered_by_what_a_guide_reads(
    tmp_path: Path, name: str, scale: float
) -> None:
    """Told the prompt, on top of classifier-free guidance, as well as not told it at all."""
    folder = str(SAVES[name](tmp_path / name))
    blind = Steering(BRIGHT, "prompt", unconditional=scale == 1, checkpointing=True)
    module = TrainingFreeGuidance(folder, blind, sampling_guidance=scale)
    module.configure_model()
    found = {prompt: mean_brightness(module, prompt) for prompt in ("a", "abcde")}
    assert found["a"] < found["abcde"] - 0.01
    if scale == 1:
        return
    module.steer(replace(blind, detach_null=True))
    assert mean_brightness(module, "a") != found["a"]
    with pytest.raises(FewstepError, match="detach_null is for classifier-free guidance"):
        replace(blind, unconditional=True, detach_null=True)


def test_few_frames_of_a_video_can_stand_for_all(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    class Watching(Brightness):
        def __call__(self, x0: Tensor, target: Target) -> Tensor:
            seen.append(tuple(x0.shape))
            return super().__call__(x0, target)

    steering = Steering(replace(BRIGHT, energy=Watching()), "prompt", frames=[0, 4])
    clips = Pretrained(str(SAVES["wan"](tmp_path / "wan")), (32, 32), 5)
    module = TrainingFreeGuidance(clips, steering)
    module.configure_model()
    mean_brightness(module, "a")
    assert set(seen) == {(2, 3, 2, 32, 32)}
    pixels = built("teacher")
    with pytest.raises(FewstepError, match="here nothing is decoded"):
        sampled(pixels, 2, Steering(STRONG, frames=[0]))
