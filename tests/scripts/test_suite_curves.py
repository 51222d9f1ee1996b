"""A suite's numbers against what its grid goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from scripts.loggers import MetricsCSV
from scripts.suite.curves import write_curves
from scripts.suite.line_charts import line_charts
from scripts.suite.plan import Cell, Plan
from scripts.suite.states import Standing, State

from suites import HOME, finish, plan, write_suite

LAYERS = "model.init_args.backbone.init_args.num_layers"


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


def test_each_label_is_a_line_of_means_over_seeds_and_the_last_held_out_loss_counts() -> None:
    entry = {"experiment": "digits/rdm"}
    gated = {**entry, "label": "gated", "set": {"model.init_args.gates": {"mode": "alpha"}}}
    found = done(
        lambda cell: cell.variant.point[LAYERS] + cell.seed,
        seeds=[0, 2],
        grid={f"{LAYERS}, trainer.max_steps": [[4, 20], [16, 5]]},
        experiments=[{**entry, "label": "none"}, gated],
    )
    text, image = write_curves(found)
    assert (text, image) == (HOME / "against_num_layers.md", HOME / "against_num_layers.png")
    head, distances, losses = text.read_text().partition("`val/loss`")
    assert distances
    assert "train/loss" not in losses
    assert all("| run | 4 | 16 |" in part for part in (head, losses))
    assert "frechet_digits at 4 steps` against `num_layers`, mean ± standard deviation" in head
    for label in ("none", "gated"):
        assert f"| {label} | 5.000 ± 1.414 | 17.000 ± 1.414 |" in head
        assert f"| {label} | 100.000 ± 28.284 | 340.000 ± 28.284 |" in losses
    assert Image.open(image).size[0] > 0


def test_grids_of_words_and_single_numbers_have_no_curves() -> None:
    grid = {"model.init_args.lr_decay": ["cosine", "linear"], LAYERS: [4]}
    found = done(lambda cell: 1.0, experiments=[{"experiment": "digits/rdm", "grid": grid}])
    assert write_curves(found) == []


def test_a_chart_draws_each_line_in_its_colour_and_leaves_out_what_is_not_finite() -> None:
    points = {"a": [(1, [1.0, 2.0]), (2, [float("nan")])], "b": [(1, [100.0]), (2, [900.0])]}
    drawn = line_charts({"loss": points, "empty": {"a": []}}, "depth")
    colours = {colour for _, colour in drawn.convert("RGB").getcolors(2**24) or []}
    assert {(0x25, 0x63, 0xA8), (0xB4, 0x54, 0x1A)} <= colours
