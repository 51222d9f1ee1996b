from __future__ import annotations

import pytest

from fewstep.errors import FewstepError
from fewstep.guidance import (
    TFG_KNOBS,
    AdamMoments,
    Capped,
    Guidance,
    Knob,
    Polyak,
    Recurrence,
    Scheduled,
    tfg,
)
from fewstep.guidance.knobs import configured, read_number, with_number

from guided import MATRIX

NESTED = Guidance(MATRIX, Capped(Polyak(1), 0.2), inner_steps=2, recurrence=Recurrence(3))


def test_numbers_are_read_and_changed_wherever_they_are() -> None:
    assert read_number(NESTED, "state.rule.strength") == 1
    changed = configured(
        NESTED, {"state.rule.strength": 0.5, "state.radius": 0.1, "recurrence.count": 2.0}
    )
    assert changed.state == Capped(Polyak(0.5), 0.1)
    assert changed.recurrence == Recurrence(2)
    assert NESTED.state == Capped(Polyak(1), 0.2)
    assert changed.energy is NESTED.energy


def test_what_counts_stays_whole_and_what_does_not_may_be_written_as_whole() -> None:
    assert with_number(NESTED, "inner_steps", 2.6).inner_steps == 3
    knob = Knob("inner_steps", 7, 1.2)
    values = [knob.first(NESTED)]
    for _ in range(7):
        values.append(knob.raised(NESTED, values[-1]))
    assert values == [2, 3, 4, 5, 6, 7, 7, 7]
    strength = Knob("state.rule.strength", 1.6, 1.5)  # was written as 1
    assert strength.raised(NESTED, 1) == 1.5
    assert strength.raised(NESTED, 1.5) == 1.6


def test_tfgs_knobs_turn_tfgs_numbers() -> None:
    guidance = tfg(MATRIX)
    assert [knob.first(guidance) for knob in TFG_KNOBS] == [0.25, 0.25, 0.001]
    assert [knob.raised(guidance, 0.5) for knob in TFG_KNOBS] == [1, 1, 1]
    assert [knob.raised(guidance, 5.0) for knob in TFG_KNOBS[:2]] == [8, 8]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("state.rule.strenght", "Did you mean 'strength'"),
        ("clean.strength", "NoneType has no 'strength'"),
        ("energy", "is a LinearMeasurement; only numbers"),
        ("state.rule.gap", "is a str; only numbers"),
    ],
)
def test_a_number_that_is_not_there_is_refused(field: str, message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        Knob(field, 8).first(NESTED)


def test_a_knob_that_leads_nowhere_is_refused() -> None:
    with pytest.raises(FewstepError, match="a factor above 1"):
        Knob("inner_steps", 8, 1.0)
    for start in (0.0, 9.0):
        with pytest.raises(FewstepError, match="start above 0 and not above the cap"):
            Knob("state.strength", 8).first(Guidance(MATRIX, Scheduled(start)))
    assert Knob("state.beta1", 0.99).first(Guidance(MATRIX, AdamMoments(0.1))) == 0.9
