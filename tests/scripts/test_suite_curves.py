"""A suite's numbers against what its grid goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.loggers import MetricsCSV
from scripts.suite import curves
from scripts.suite.curves import write_curves
from scripts.suite.plan import Cell, Plan
from scripts.suite.states import Standing, State

from suites import HOME, finish, plan, write_suite

LAYERS = "model.init_args.backbone.init_args.num_layers"
DEPTHS = {f"{LAYERS}, trainer.max_steps": [[4, 20], [16, 5]]}
ENTRY = {"experiment": "digits/rdm"}
NONE = {**ENTRY, "label": "none"}
GATED = {**ENTRY, "label": "gated", "set": {"model.init_args.gates": {"mode": "alpha"}}}


def done(value: Callable[[Cell], float], **content: object) -> Plan:
    """The plan of a suite whose runs are done, each with a Frechet distance and a loss."""
    write_suite(**content)
    found = plan()
    for cell in found.cells:
        finish(cell, value(cell))
        for step in (10, 20):
            loss = {"val/loss": value(cell) * step, "train/loss": 1.0}
            MetricsCSV(cell.folder).log_metrics(loss, step=step)
        cell.standing = Standing(State.DONE)
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/nowhere")


@pytest.mark.slow
def test_each_label_is_a_line_of_means_over_seeds_and_the_last_held_out_loss_counts() -> None:
    found = done(
        lambda cell: cell.variant.point[LAYERS] + cell.seed,
        seeds=[0, 2],
        grid=DEPTHS,
        experiments=[NONE, GATED],
    )
    text, image = write_curves(found)
    assert (text, image) == (HOME / "against_num_layers.md", HOME / "against_num_layers.png")
    head, distances, losses = text.read_text().partition("`val/loss`")
    assert distances
    assert "train/loss" not in losses
    assert "frechet_digits at 4 steps` against `num_layers`, mean ± standard deviation" in head
    for label in ("none", "gated"):
        assert f"| {label} | 5.000 ± 1.414 | 17.000 ± 1.414 |" in head
        assert f"| {label} | 100.000 ± 28.284 | 340.000 ± 28.284 |" in losses
    assert "not in these numbers" not in losses
    assert Image.open(image).size[0] > 0


def test_updates_that_change_with_the_setting_are_named_at_each_of_its_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[object] = []
    charts = curves.line_charts

    def noted(*given: Any) -> Image.Image:
        drawn.append(given[2])
        return charts(*given)

    monkeypatch.setattr(curves, "line_charts", noted)
    text, _ = write_curves(done(lambda cell: 1.0, grid=DEPTHS, experiments=[NONE]))
    heads = [line for line in text.read_text().splitlines() if line.startswith("| run")]
    assert heads == ["| run | 4 (20 updates) | 16 (5 updates) |"] * 2
    same = done(lambda cell: 1.0, grid={LAYERS: [4, 16]}, experiments=[NONE])
    assert "| run | 4 | 16 |" in write_curves(same)[0].read_text()
    assert drawn == [{4: "4\n20 updates", 16: "16\n5 updates"}, {}]


@pytest.mark.slow
def test_numbers_say_of_how_many_runs_they_are_and_which_diverged() -> None:
    found = done(
        lambda cell: 1.0 + cell.seed, seeds=[0, 1, 2], grid=DEPTHS, experiments=[NONE, GATED]
    )
    before = Image.open(write_curves(found)[1]).size[1]
    for cell in found.cells:
        deep, one = cell.variant.point[LAYERS] == 16, (cell.variant.entry.label, cell.seed)
        if deep and one != ("none", 2):
            cell.standing = Standing(State.FAILED, "diverged, at update 3 of 5")
    found.cells[1].standing = Standing(State.TODO)
    text, image = write_curves(found)
    losses = text.read_text().partition("`val/loss`")[2]
    numbers = "40.000 ± 28.284 (2 of 3 runs, 1 to do) | 60.000 (1 of 3 runs, 2 diverged)"
    assert f"| none | {numbers} |" in losses
    assert "| gated | 40.000 ± 20.000 | – (0 of 3 runs, 3 diverged) |" in losses
    assert losses.partition("not in these numbers\n\n")[2].splitlines() == [
        "- `none,num_layers=4`: to do (seed 1)",
        "- `none,num_layers=16`: diverged (seed 0, 1)",
        "- `gated,num_layers=16`: diverged (seed 0, 1, 2)",
    ]
    assert Image.open(image).size[1] > before, "a line of text for each number that lacks runs"


@pytest.mark.slow
def test_a_line_of_which_every_run_diverged_has_a_row() -> None:
    found = done(lambda cell: 1.0, grid=DEPTHS, experiments=[NONE, GATED])
    for cell in found.cells[2:]:
        cell.standing = Standing(State.FAILED, "diverged")
    rows = write_curves(found)[0].read_text()
    assert rows.count("| gated | – (0 of 1 runs, 1 diverged) | – (0 of 1 runs, 1 diverged) |") == 2


def test_grids_of_words_and_single_numbers_have_no_curves() -> None:
    grid = {"model.init_args.lr_decay": ["cosine", "linear"], LAYERS: [4]}
    found = done(lambda cell: 1.0, experiments=[{"experiment": "digits/rdm", "grid": grid}])
    assert write_curves(found) == []
