"""Which schedulers of diffusers do exactly what the samplers do, and which only nearly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest

from fewstep.diffusion import Denoiser, FlowSchedule, PhaseSchedule, TimeGrid, VPSchedule
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from scripts.export import matching
from scripts.export.chains import chain_of, default_steps
from scripts.export.matching import FrontEnd, Match, find_match

SD, DIT, SD3 = "StableDiffusionPipeline", "DiTPipeline", "StableDiffusion3Pipeline"
MODELSCOPE, FLUX, LTX, WAN = "TextToVideoSDPipeline", "FluxPipeline", "LTXPipeline", "WanPipeline"
INDEX_0, CLEAN = VPSchedule(), VPSchedule(trajectory_end="clean")
ZERO_SNR = VPSchedule(rescale_betas_zero_snr=True, trajectory_end="clean")
FLOW = FlowSchedule(3.0)


def record(schedule: Schedule, grid: int, phases: int = 1, **rest: Any) -> dict[str, Any]:
    """A checkpoint's, of consistency distillation for one phase."""
    found = PhaseSchedule(TimeGrid.uniform(schedule, grid), phases)
    kind = "ConsistencyDistillation" if phases == 1 else "PhasedConsistencyDistillation"
    return {"method": kind, "phases": found.to_config(), "boundary": "jump", **rest}


def match(
    pipeline: str,
    prediction: PredictionType,
    schedule: Schedule,
    said: dict[str, Any],
    steps: list[int] | None = None,
    alpha_floor: float = 0.0,
) -> Match:
    student = Denoiser(DiT(8, 1, num_layers=1), schedule, prediction, alpha_floor)
    chains = [chain_of(said, schedule, k) for k in steps or default_steps(said)]
    return find_match(student, chains, FrontEnd.of(pipeline), len(said["phases"]["times"]))


PHASED = [
    (SD, "epsilon", INDEX_0, 40, 8, "DDIMScheduler", {}),
    (SD, "epsilon", CLEAN, 40, 4, "DDIMScheduler", {}),
    (SD, "v_prediction", ZERO_SNR, 50, 5, "DDIMScheduler", {}),
    (DIT, "sample", CLEAN, 100, 4, "DDIMScheduler", {}),
    (SD, "v_prediction", INDEX_0, 50, 8, "TCDScheduler", {"arguments": ["eta", "timesteps"]}),
    (SD, "epsilon", INDEX_0, 40, 16, "TCDScheduler", {"arguments": ["eta", "timesteps"]}),
    (
        MODELSCOPE,
        "epsilon",
        INDEX_0,
        100,
        8,
        "TCDScheduler",
        {"arguments": ["eta"], "visit": ["timesteps"]},
    ),
    (SD, "epsilon", CLEAN, 50, 4, "DPMSolverMultistepScheduler", {"arguments": ["timesteps"]}),
    (DIT, "sample", INDEX_0, 50, 4, "DPMSolverMultistepScheduler", {"visit": ["timesteps"]}),
    (SD3, "flow_prediction", FLOW, 100, 4, "FlowMapEulerDiscreteScheduler", {}),
    (WAN, "flow_prediction", FLOW, 40, 8, "FlowMapEulerDiscreteScheduler", {}),
    (FLUX, "flow_prediction", FLOW, 40, 8, "FlowMatchEulerDiscreteScheduler", {}),
    (LTX, "flow_prediction", FLOW, 40, 2, "FlowMatchEulerDiscreteScheduler", {}),
    (
        SD3,
        "flow_prediction",
        FLOW,
        50,
        4,
        "FlowMatchEulerDiscreteScheduler",
        {"arguments": ["sigmas"]},
    ),
    (LTX, "flow_prediction", FLOW, 50, 4, "FlowMatchEulerDiscreteScheduler", {"visit": ["sigmas"]}),
]


@pytest.mark.parametrize(
    ("pipeline", "prediction", "schedule", "grid", "phases", "name", "said"), PHASED
)
def test_phased_students_have_a_scheduler_that_visits_their_edges(
    pipeline: str,
    prediction: PredictionType,
    schedule: Schedule,
    grid: int,
    phases: int,
    name: str,
    said: dict[str, list[str]],
) -> None:
    found = match(pipeline, prediction, schedule, record(schedule, grid, phases))
    assert type(found.scheduler).__name__ == name
    steering = found.steering[phases]
    assert list(steering.arguments) == said.get("arguments", [])
    assert list(steering.visit) == said.get("visit", [])
    assert found.deviation < 2e-6


@pytest.mark.parametrize("steps", [[1], [1, 2, 3, 4, 6, 8, 50]])
@pytest.mark.parametrize("pipeline", [SD, MODELSCOPE])
def test_consistency_students_that_end_at_index_0_are_sampled_by_tcd(
    pipeline: str, steps: list[int]
) -> None:
    found = match(pipeline, "epsilon", INDEX_0, record(INDEX_0, 50), steps)
    assert type(found.scheduler).__name__ == "TCDScheduler"
    assert all(found.steering[k] == matching.Steering({"eta": 1.0}) for k in steps)


@pytest.mark.parametrize("pipeline", [SD, DIT])
@pytest.mark.parametrize(
    ("schedule", "boundary"), [(CLEAN, "jump"), (CLEAN, "lcm"), (INDEX_0, "lcm")]
)
def test_consistency_students_that_end_clean_are_sampled_by_lcm(
    pipeline: str, schedule: Schedule, boundary: str
) -> None:
    said = record(schedule, 50, boundary=boundary)
    found = match(pipeline, "v_prediction", schedule, said, [1, 2, 4, 8, 50])
    assert type(found.scheduler).__name__ == "LCMScheduler"
    assert all(way == matching.Steering() for way in found.steering.values())


def test_flow_consistency_students_are_sampled_by_flow_lcm_at_stated_times() -> None:
    said = record(FLOW, 50)
    ways = match(SD3, "flow_prediction", FLOW, said).steering
    assert list(ways[1].arguments) == []
    assert ways[4].arguments == {"sigmas": [1.0, 0.76, 0.5, 0.26]}
    assert match(WAN, "flow_prediction", FLOW, said).steering[2].visit == {"sigmas": [1.0, 0.5]}
    assert match(FLUX, "flow_prediction", FLOW, said).steering[2] == matching.Steering()


def test_edges_are_those_of_the_record_not_of_the_step_count() -> None:
    said = record(INDEX_0, 50, 4)
    assert chain_of(said, INDEX_0, 4).times.tolist() == [999, 739, 499, 239, 0]
    way = match(SD, "epsilon", INDEX_0, said).steering[4]
    assert way.arguments["timesteps"] == [999, 739, 499, 239]


# ---------------------------------------------------------------------- nearly the same is refused

RIGHT = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"clip_sample": True},
        {"set_alpha_to_one": True},
        {"timestep_spacing": "leading"},
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.0121},
        {"thresholding": True},
    ],
    ids=str,
)
def test_one_wrong_setting_of_a_scheduler_is_noticed(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(*_: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        yield diffusers.DDIMScheduler(**{**RIGHT, **wrong}), {}

    monkeypatch.setattr(matching, "_candidates", candidates)
    said = record(INDEX_0, 40, 4)
    if not wrong:
        assert match(SD, "epsilon", INDEX_0, said).deviation < 1e-6
        return
    with pytest.raises(FewstepError, match="No scheduler of diffusers samples as this student"):
        match(SD, "epsilon", INDEX_0, said)


def test_what_diffusers_cannot_do_is_refused() -> None:
    with pytest.raises(FewstepError, match=r"alpha_floor"):
        match(SD, "epsilon", INDEX_0, record(INDEX_0, 40, 2), alpha_floor=0.5)
    first = FlowSchedule(3.0, trajectory_end="first_index")
    with pytest.raises(FewstepError, match=r"ends at time 2\.99"):
        match(SD3, "flow_prediction", first, record(first, 100, 4))
    # DiTPipeline has no eta, without which TCD does something else.
    with pytest.raises(FewstepError, match="re-noises from time 0"):
        match(DIT, "epsilon", INDEX_0, record(INDEX_0, 50))


def test_stochastic_chains_are_exported_where_they_can_be_and_said_to_be_left_out_otherwise() -> (
    None
):
    whole = record(CLEAN, 40, 4, sampling={"stochasticity": 1.0})
    assert chain_of(whole, CLEAN, 4).renoise
    assert type(match(SD, "epsilon", CLEAN, whole).scheduler).__name__ == "LCMScheduler"
    half = record(CLEAN, 40, 4, sampling={"stochasticity": 0.5})
    chain = chain_of(half, CLEAN, 4)
    assert not chain.renoise
    assert "only its deterministic chain" in chain.note


@pytest.mark.parametrize(
    ("pipeline", "prediction", "schedule", "name"),
    [
        (SD3, "flow_prediction", FLOW, "FlowMatchLCMScheduler"),
        (SD, "epsilon", CLEAN, "LCMScheduler"),
    ],
)
def test_a_student_of_one_phase_is_exported_for_one_step_and_several(
    pipeline: str, prediction: PredictionType, schedule: Schedule, name: str
) -> None:
    said = {**record(schedule, 100), "method": "PhasedConsistencyDistillation"}
    found = match(pipeline, prediction, schedule, said, [1, 2, 4])
    assert type(found.scheduler).__name__ == name
    assert sorted(found.steering) == [1, 2, 4]
    alone = type(match(pipeline, prediction, schedule, said).scheduler).__name__
    assert alone in ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler")


def test_a_trained_teacher_is_sampled_by_ddim() -> None:
    said = {**record(INDEX_0, 50), "method": "DiffusionTraining"}
    assert type(match(SD, "epsilon", INDEX_0, said).scheduler).__name__ == "DDIMScheduler"
    drawn = {**said, "sampling": {"sampler": "ddpm"}}
    assert "samples by DDPM" in chain_of(drawn, INDEX_0, 4).note
    assert not chain_of(said, INDEX_0, 4).note


def test_unknown_methods_and_step_counts_are_refused() -> None:
    with pytest.raises(FewstepError, match="Students of Sorcery cannot be exported"):
        chain_of({"method": "Sorcery"}, INDEX_0, 1)
    with pytest.raises(FewstepError, match="serves 1 to 50 steps, not 51"):
        chain_of(record(INDEX_0, 50), INDEX_0, 51)
    with pytest.raises(FewstepError, match="serves 4 sampling steps, not 2"):
        chain_of(record(INDEX_0, 40, 4), INDEX_0, 2)
