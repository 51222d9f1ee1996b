from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance import (
    Bench,
    ClassLabel,
    Guidance,
    GuidedSamples,
    Judge,
    Knob,
    Normalised,
    Recurrence,
    Scheduled,
    beam_search,
    grid_search,
    guided_sample,
    line_search,
)
from fewstep.guidance.knobs import read_number
from fewstep.guidance.trace import Recorder

from guided import MATRIX, NOISE, TARGET, TIMES, randn

START = Guidance(MATRIX, Scheduled(0.25), Scheduled(0.25))
KNOBS = (Knob("state.strength", 8.0), Knob("clean.strength", 3.0))
Two = tuple[float, float]


class Told(Judge):
    """Repeats the score that is written in the samples."""

    def __call__(self, samples: Tensor, target: Any) -> Tensor:
        return samples[:, 0]


def bench(score: Callable[..., float], tried: list[Two], **options: Any) -> Bench:
    def sample(guidance: Guidance) -> GuidedSamples:
        values = [read_number(guidance, knob.field) for knob in KNOBS]
        tried.append((values[0], values[1]))
        samples = score(*values) + torch.tensor([[-1.0], [1.0], [0.0]])
        return GuidedSamples(samples, Recorder(denoiser_evaluations=5).close(samples, None))

    return Bench(sample, Told(), **options)


def planted(state: float, clean: float) -> float:
    """Best at 2 and 1."""
    offset = torch.tensor([state / 2, clean]).log2()
    return -float(offset.square().sum())


def test_beam_search_finds_a_planted_optimum() -> None:
    tried: list[Two] = []
    result = beam_search(START, KNOBS, bench(planted, tried))
    assert result.best.values == {"state.strength": 2.0, "clean.strength": 1.0}
    assert result.best.score == 0
    assert result.best.error == pytest.approx(1 / 3**0.5)
    assert result.best.denoiser_evaluations == 5
    assert result.guidance == Guidance(MATRIX, Scheduled(2.0), Scheduled(1.0))
    scores = [trial.score for trial in result.ranked]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_nothing_is_tried_twice_and_nothing_beyond_a_cap() -> None:
    tried: list[Two] = []
    result = beam_search(START, KNOBS, bench(lambda a, b: a + b, tried), topk=3, rounds=20)
    assert len(tried) == len(set(tried)) == len(result.trials)
    assert max(a for a, _ in tried) == 8
    assert max(b for _, b in tried) == 3  # and not 4: the cap itself is tried
    assert result.best.values == {"state.strength": 8.0, "clean.strength": 3.0}
    # It ended by itself, when no child was new.
    assert result.trials[-1].round < 20


def test_a_round_raises_one_number_of_each_of_the_best_of_all_so_far() -> None:
    tried: list[Two] = []
    beam_search(START, KNOBS, bench(planted, tried), topk=1, rounds=2)
    # Of two children equally good, the first one made goes on.
    assert tried == [(0.25, 0.25), (0.5, 0.25), (0.25, 0.5), (1.0, 0.25), (0.5, 0.5)]


def test_a_search_that_was_broken_off_goes_on_from_its_records() -> None:
    whole: list[Two] = []
    result = beam_search(START, KNOBS, bench(planted, whole))
    saved: list[dict[str, Any]] = []

    class InterruptionError(Exception):
        pass

    def save(trial: Any) -> None:
        saved.append(json.loads(json.dumps(trial.to_record())))
        if len(saved) == 7:
            raise InterruptionError

    first, second = [], []
    with pytest.raises(InterruptionError):
        beam_search(START, KNOBS, bench(planted, first, on_trial=save))
    again = beam_search(START, KNOBS, bench(planted, second), known=saved)
    assert first + second == whole
    assert [(t.values, t.score, t.round) for t in again.trials] == [
        (t.values, t.score, t.round) for t in result.trials
    ]
    third: list[Two] = []
    assert beam_search(START, KNOBS, bench(planted, third), known=again.records()).best == (
        again.best
    )
    assert not third


def test_records_of_another_search_are_refused() -> None:
    records = line_search(START, KNOBS[0], bench(planted, [])).records()
    with pytest.raises(FewstepError, match="A record of another search"):
        beam_search(START, KNOBS, bench(planted, []), known=records)
    with pytest.raises(FewstepError, match="cannot be read"):
        beam_search(START, KNOBS, bench(planted, []), known=[{"score": 1}])


def test_one_number_is_doubled_up_to_its_cap_for_baselines() -> None:
    tried: list[Two] = []
    line_search(START, KNOBS[1], bench(planted, tried))
    assert [b for _, b in tried] == [0.25, 0.5, 1.0, 2.0, 3.0]
    grid = {"state.strength": [1.0, 2.0], "clean.strength": [0.5, 1.0]}
    result = grid_search(START, grid, bench(planted, tried))
    assert len(result.trials) == 4
    assert result.best.values == {"state.strength": 2.0, "clean.strength": 1.0}


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(net: Any) -> None:
    guidance = Guidance(MATRIX, Scheduled(0.1))

    def sample(guidance: Guidance) -> GuidedSamples:
        return guided_sample(net, NOISE, None, TIMES, guidance, TARGET)

    class Near(Judge):
        def __call__(self, samples: Tensor, target: Any) -> Tensor:
            return -samples.norm(dim=1)

    knob = Knob("state.strength", 1e5, 1e3)
    result = line_search(guidance, knob, Bench(sample, Near()))
    last = result.trials[-1]
    assert last.score is None
    assert last.failure is not None
    assert "Guidance diverged" in last.failure
    assert json.loads(json.dumps(result.records()))[-1]["score"] is None
    assert result.best.values["state.strength"] == 0.1
    assert result.best.denoiser_gradients == 4
    always = Guidance(MATRIX, Scheduled(1e5))
    with pytest.raises(FewstepError, match="All 1 trials of the search failed"):
        beam_search(always, [Knob("state.strength", 1e9)], Bench(sample, Near()))


def test_scores_that_are_no_scores_are_refused() -> None:
    class Mean(Told):
        def __call__(self, samples: Tensor, target: Any) -> Tensor:
            return samples.mean()

    class Lost(Told):
        def __call__(self, samples: Tensor, target: Any) -> Tensor:
            return samples[:, 0] * torch.nan

    sample = bench(planted, []).sample
    with pytest.raises(FewstepError, match="one score for each sample"):
        line_search(START, KNOBS[0], Bench(sample, Mean()))
    result = line_search(START, KNOBS[0], Bench(sample, Lost()))
    with pytest.raises(FewstepError, match="not finite"):
        _ = result.best


def test_the_guide_is_refused_as_judge_before_anything_is_sampled(net: Any) -> None:
    guide = nn.Linear(4, 3).double().eval()
    guidance = Guidance(ClassLabel(guide), Normalised(0.1), recurrence=Recurrence(1))
    tried: list[int] = []

    class Sure(Judge):
        def __init__(self, reader: nn.Module) -> None:
            self.reader = reader

        def __call__(self, samples: Tensor, target: Any) -> Tensor:
            return self.reader(samples).softmax(1)[:, 0].detach()

    def sample(guidance: Guidance) -> GuidedSamples:
        tried.append(1)
        labels = torch.zeros(3).long()
        return guided_sample(net, randn(3, 4), None, TIMES, guidance, labels)

    knobs = [Knob("state.strength", 0.4), Knob("recurrence.count", 2)]
    with pytest.raises(FewstepError, match="looks through the network of the guide"):
        beam_search(guidance, knobs, Bench(sample, Sure(guide)))
    assert not tried
    other = nn.Linear(4, 3).double().eval()
    result = beam_search(guidance, knobs, Bench(sample, Sure(other)), rounds=2)
    assert len(tried) == len(result.trials) > 3
    assert {type(t.values["recurrence.count"]) for t in result.trials} == {int}


def test_a_search_without_a_beam_is_refused() -> None:
    for options in ({"topk": 0}, {"rounds": 0}):
        with pytest.raises(FewstepError, match="topk and rounds of 1 or more"):
            beam_search(START, KNOBS, bench(planted, []), **options)
