"""Values that leave their range: who is told, how often, and what stays written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks import Alarms, Checkpoints
from callbacks.alarms import read_alarms
from datamodules import RingData
from fewstep.contracts import Alarm, Batch, Watched
from fewstep.errors import FewstepError
from lightning_modules import ConsistencyDistillation
from lightning_modules.consistency_distillation import ConsistencyDraws
from lightning_modules.roles import Update

from ranks import run_ranks
from rings import Run, quiet_trainer, ring_teacher

ADVICE = "The head forgets its input; lower its learning rate."
COLLAPSE = Alarm("train/variance", below=0.3, advice=ADVICE)


class Collapsing(ConsistencyDistillation):
    """Logs stated values in turn, each for so many updates, and has them watched."""

    def __init__(
        self,
        values: Sequence[float],
        each: int = 2,
        watched: Sequence[Alarm] = (COLLAPSE,),
        spread: float = 0.0,
    ) -> None:
        super().__init__(ring_teacher, 50)
        self.values, self.each, self.watched, self.spread = values, each, watched, spread

    def alarms(self) -> Sequence[Alarm]:
        return self.watched

    def updates(self, batch: Batch, draws: ConsistencyDraws) -> Iterator[Update]:
        value = self.values[min(self.student_updates // self.each, len(self.values) - 1)]
        value += self.spread * (self.global_rank - 0.5) + 0.2 * (-1) ** self.student_updates
        for update in super().updates(batch, draws):
            yield Update(update.role, update.loss, {"loss": update.loss})
        self.log("train/variance", torch.tensor(value))


def fit(
    folder: Path, module: pl.LightningModule, updates: int, *callbacks: pl.Callback, **options: Any
) -> pl.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer: pl.Trainer = quiet_trainer(folder, list(callbacks), updates, **options)
    data = RingData(batch_size=32, reference_samples=64)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "train/variance" in line]


def states(folder: Path) -> list[tuple[int, str]]:
    return [(line["update"], line["state"]) for line in read_alarms(folder)]


def test_a_value_below_its_range_is_told_once_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, Collapsing([1, 0.1]), 12, Alarms(every_n_updates=2, patience=1))
    assert warnings(capsys) == [
        f"Alarm: train/variance was 0.1 on average at update 4, below 0.3. {ADVICE}"
    ]
    (line,) = read_alarms(tmp_path)
    assert line.pop("mean") == pytest.approx(0.1)
    assert line == {"update": 4, "state": "raised", **COLLAPSE._asdict()}


def test_a_value_that_comes_back_is_told_again_at_its_next_fall(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Collapsing([1, 0.1, 0.1, 0.9, 0.9, 0.2])
    fit(tmp_path, module, 14, Alarms(every_n_updates=2, patience=1))
    told = warnings(capsys)
    assert [line.startswith("Alarm: ") for line in told] == [True, False, True]
    assert "at update 8, back in its range." in told[1]
    assert states(tmp_path) == [(4, "raised"), (8, "ended"), (12, "raised")]


def test_one_look_alone_raises_nothing_where_patience_is_asked_for(tmp_path: Path) -> None:
    module = Collapsing([1, 0.1, 1, 0.1, 0.1, 1, 0.1])
    fit(tmp_path, module, 14, Alarms(every_n_updates=2, patience=2))
    assert states(tmp_path) == [(10, "raised")]


def test_a_value_is_judged_by_its_mean_since_the_last_look(tmp_path: Path) -> None:
    # Every other value is beyond the range, their mean is not.
    fit(tmp_path, Collapsing([0.4]), 8, Alarms(every_n_updates=2, patience=1))
    assert states(tmp_path) == []
    fit(tmp_path, Collapsing([0.4]), 8, Alarms(every_n_updates=1, patience=1))
    assert states(tmp_path)[0] == (2, "raised")


def test_ranges_may_end_above_and_values_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = [Alarm("train/variance", 0.05, 0.5), Alarm("train/unknown", below=1e9)]
    fit(tmp_path, Collapsing([0.1, 0.7], watched=watched), 6, Alarms(2, patience=1))
    assert warnings(capsys) == ["Alarm: train/variance was 0.7 on average at update 4, above 0.5."]


def test_methods_without_alarms_are_left_alone(run: Run, tmp_path: Path) -> None:
    assert not isinstance(ConsistencyDistillation(ring_teacher, 50), Watched)
    run([Alarms(every_n_updates=1)])
    assert not list(tmp_path.rglob("alarms.jsonl"))


def test_the_host_waits_for_the_device_at_looks_alone(tmp_path: Path) -> None:
    class Reading(Alarms):
        looks = 0

        def _look(self, *args: Any) -> None:
            type(self).looks += 1
            super()._look(*args)

    fit(tmp_path, Collapsing([1]), 12, Reading(every_n_updates=5))
    assert Reading.looks == 2


def test_an_alarm_goes_on_over_a_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [1, 0.1, 0.1, 1, 1]
    fit(tmp_path, Collapsing(values), 10, Alarms(2), Checkpoints(6, keep=None))
    assert states(tmp_path) == [(6, "raised"), (10, "ended")]
    warnings(capsys)
    checkpoint = tmp_path / "checkpoints" / "update_00000006.ckpt"
    resumed = Collapsing([1, 0.1, 0.1, 0.1, 1])
    fit(tmp_path, resumed, 12, Alarms(2), ckpt_path=checkpoint)
    assert states(tmp_path) == [(6, "raised"), (12, "ended")]
    assert len(warnings(capsys)) == 1, "the alarm was told again"


def test_loggers_get_the_alarms_state(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = Collapsing([1, 0.1, 1])
    fit(tmp_path, module, 6, Alarms(2, patience=1), logger=logger, log_every_n_steps=1)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("alarms/variance")
    assert [float(v) for v in (row.split(",")[column] for row in rows) if v] == [1, 0]


def fit_on_two(folder: Path, value: float) -> list[dict[str, Any]]:
    alarms = Alarms(every_n_updates=2, patience=1)
    module = Collapsing([value], spread=1.0)
    fit(folder, module, 4, alarms, devices=2, strategy="ddp")
    return alarms.record


def test_all_ranks_judge_by_the_mean_of_all(tmp_path: Path) -> None:
    # The first rank's own value is always below the range, the second's never.
    for value, told in ((0.4, 0), (0.2, 1)):
        folder = tmp_path / str(value)
        first, second = run_ranks(2, fit_on_two, folder, value)
        assert first == second
        assert len(first) == told
        assert read_alarms(folder) == first


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    assert read_alarms(tmp_path) == []
    (tmp_path / "alarms.jsonl").write_text(json.dumps({"update": 1}) + "\n{")
    with pytest.raises(FewstepError, match=r"alarms\.jsonl' cannot be read"):
        read_alarms(tmp_path)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(FewstepError, match="at least 1, not 0 and 2"):
        Alarms(every_n_updates=0)
