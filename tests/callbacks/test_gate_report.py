"""What is written of gates while they train, and that it is what they and their streams are."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from callbacks import GateReport
from callbacks.charts import COLOUR, HEIGHT, bar_charts
from callbacks.gates import STREAMS, read_gate_report
from fewstep.errors import FewstepError
from fewstep.networks.gates import gate_tensors, gate_values
from lightning_modules import FewStepModule

from ranks import run_ranks
from training_runs import data_for, method, trainer_of, whole

STACK = "student.backbone.transformer.transformer_blocks"
Rows = list[dict[str, Any]]


def fit(
    folder: Path, module: FewStepModule, updates: int, every: int = 2, **options: Any
) -> pl.Trainer:
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    kind, world = options.pop("kind", "single"), options.pop("world", 1)
    report = GateReport(every_n_updates=every)
    trainer = trainer_of(kind, world, updates, report, folder=folder)
    trainer.fit(module, data_for("gated"), weights_only=True, **options)
    return trainer


def test_a_gate_a_line_every_so_many_updates_and_at_the_last(tmp_path: Path) -> None:
    module = method("gated", accumulate=2)
    fit(tmp_path, module, 5)
    rows = read_gate_report(tmp_path)
    blocks = [f"transformer_blocks.{i}." for i in (0, 0, 1, 1)]
    assert [row["update"] for row in rows] == [2] * 4 + [4] * 4 + [5] * 4
    assert all(row["gate"].startswith(b) for row, b in zip(rows, blocks * 3, strict=True))
    values = {value.name: value for value in gate_values(gate_tensors(module.student))}
    for row in rows[-4:]:
        now = values[row["gate"]]
        assert (row["alpha"], row["beta"]) == (now.alpha, now.beta)
        assert (row["role"], row["rho"], row["skip"]) == ("student", None, None)
    assert {path.name for path in (tmp_path / "gates").iterdir()} == {
        "values.csv",
        *(f"0000000{n}_student.png" for n in (2, 4, 5)),
    }


class Blocks(pl.Callback):
    """What the second block is given and gives in the first pass, and the gradient there."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        block = pl_module.get_submodule(f"{STACK}.1")
        self.passes: list[Any] = []
        self.gated: dict[str, list[Any]] = {"attn1.to_out.0": [], "ff.net.2": []}
        block.register_forward_hook(self.note)
        for name, outputs in self.gated.items():
            hook = partial(self.note_layer, outputs)
            block.get_submodule(name).register_forward_hook(hook)

    def note_layer(self, outputs: list[Any], layer: Any, args: Any, output: Any) -> None:
        outputs.append(output.detach())

    def note(self, block: Any, args: Any, output: Any) -> None:
        args[0].retain_grad()
        output.retain_grad()
        self.passes.append((args[0], output))


def test_streams_are_those_of_the_first_micro_batch(tmp_path: Path) -> None:
    module, blocks = method("gated", accumulate=2), Blocks()
    trainer = trainer_of("single", 1, 1, blocks, GateReport(1), folder=tmp_path)
    trainer.fit(module, data_for("gated"))
    given, output = blocks.passes[0]
    assert len(blocks.passes) == 2
    for row in read_gate_report(tmp_path)[-2:]:
        rms = given.square().mean().sqrt()
        assert row["stream"] == pytest.approx(rms.item(), rel=1e-5)
        ratio = (output - given).square().mean().sqrt() / rms
        assert row["ratio"] == pytest.approx(ratio.item(), rel=1e-4)
        slope = given.grad.square().mean().sqrt()
        assert row["gradient"] == pytest.approx(slope.item(), rel=1e-5) != 0
        (branch,) = [name for name in blocks.gated if name in row["gate"]]
        added = blocks.gated[branch][0]
        assert row["unit"] == pytest.approx((added.square().mean().sqrt() / rms).item(), rel=1e-5)
        cosine = (added * given).sum() / (added.norm() * given.norm())
        assert row["cosine"] == pytest.approx(cosine.item(), abs=1e-6) != 0


@pytest.mark.parametrize("options", [{"checkpoint_activations": True}, {"train_only": "gates"}])
def test_recomputation_and_frozen_weights_leave_the_numbers_as_they_are(
    options: dict[str, Any], tmp_path: Path
) -> None:
    fit(tmp_path / "plain", method("gated"), 1, every=1)
    fit(tmp_path / "other", method("gated", **options), 1, every=1)
    pairs = zip(
        read_gate_report(tmp_path / "plain"), read_gate_report(tmp_path / "other"), strict=True
    )
    for number, (plain, other) in enumerate(pairs):
        names = ["stream", "ratio", "unit", "cosine", *(["gradient"] if number > 1 else [])]
        assert [other[n] for n in names] == pytest.approx([plain[n] for n in names], rel=1e-5)


def test_training_is_the_same_with_and_without_and_is_watched_in_reports_alone(
    tmp_path: Path,
) -> None:
    hooks: list[int] = []

    class Counting(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            hooks.append(sum(len(m._forward_hooks) for m in pl_module.student.modules()))

    modules = [method("gated"), method("gated")]
    for module, more in zip(modules, [[GateReport(2), Counting()], []], strict=True):
        pl.seed_everything(0, verbose=False)
        trainer = trainer_of("single", 1, 4, *more, folder=tmp_path)
        trainer.fit(module, data_for("gated"))
    for watched, alone in zip(*(m.state_dict().values() for m in modules), strict=True):
        assert torch.equal(watched, alone)
    assert [count - hooks[0] for count in hooks] == [0, 6, 0, 6]  # of 2 blocks and 4 layers


def test_a_resumed_run_writes_its_updates_once(tmp_path: Path) -> None:
    trainer = fit(tmp_path, method("gated"), 4, every=1)
    trainer.save_checkpoint(tmp_path / "at_4.ckpt")
    fit(tmp_path, method("gated"), 7, every=2, ckpt_path=tmp_path / "at_4.ckpt")
    assert [row["update"] for row in read_gate_report(tmp_path)[::4]] == [1, 2, 3, 4, 6, 7]
    fit(tmp_path, method("gated"), 6, every=2, ckpt_path=tmp_path / "at_4.ckpt")
    assert [row["update"] for row in read_gate_report(tmp_path)[::4]] == [1, 2, 3, 4, 6]


def test_reports_of_before_a_column_was_added_are_read_and_go_on(tmp_path: Path) -> None:
    trainer = fit(tmp_path, method("gated"), 2, every=1)
    trainer.save_checkpoint(tmp_path / "at_2.ckpt")
    path = tmp_path / "gates" / "values.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        old = csv.DictWriter(
            file,
            [name for name in rows[0] if name not in ("unit", "cosine")],
            extrasaction="ignore",
        )
        old.writeheader()
        old.writerows(rows)
    assert all(row["unit"] is row["cosine"] is None for row in read_gate_report(tmp_path))
    fit(tmp_path, method("gated"), 3, every=1, ckpt_path=tmp_path / "at_2.ckpt")
    found = read_gate_report(tmp_path)
    assert [row["update"] for row in found] == [1] * 4 + [2] * 4 + [3] * 4
    assert [row["unit"] is None for row in found] == [True] * 8 + [False] * 4
    assert [row["ratio"] for row in found[:8]] == [float(row["ratio"]) for row in rows]


def test_loggers_get_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = trainer_of("single", 1, 1, GateReport(1), folder=tmp_path)
    trainer.loggers = [logger]
    trainer.fit(method("gated"), data_for("gated"))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        *_, row = csv.DictReader(file)
    header = row.keys()
    gate = "student.transformer_blocks.0.ff.net.2.rdm_gate"
    assert {f"gates/{kind}/{gate}" for kind in ("alpha", "ratio", "unit", "cosine")} <= set(header)


def _report_of_two(folder: Path, kind: str) -> tuple[Rows, dict[str, Any]]:
    module = method("gated")
    fit(folder, module, 2, every=1, kind=kind, world=2)
    own = {name: whole(p) for name, p in module.student.named_parameters() if "rdm_gate" in name}
    return read_gate_report(folder), own


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.slow
def test_sharded_gates_are_reported_whole(kind: str, tmp_path: Path) -> None:
    (rows, gates), _ = run_ranks(2, partial(_report_of_two, tmp_path, kind))
    assert [row["update"] for row in rows] == [1] * 4 + [2] * 4
    for row in rows[-4:]:
        delta = gates[f"backbone.transformer.{row['gate']}.delta"]
        assert row["alpha"] == pytest.approx(1 + delta.double().mean().item(), abs=1e-12)
        assert row["ratio"] > 0
        assert row["stream"] > 0


def test_what_cannot_be_seen_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "ungated", method("teacher"), 1, every=1)
    assert "no gates are trained" in capsys.readouterr().out
    assert not (tmp_path / "ungated" / "gates").exists()
    module = method("gated")
    module.configure_model()
    for block in module.get_submodule(STACK).children():
        block._compiled_call_impl = block._call_impl  # as block.compile() would, without its time
    fit(tmp_path / "compiled", module, 1, every=1)
    assert "their streams stay unseen" in capsys.readouterr().out
    for row in read_gate_report(tmp_path / "compiled"):
        assert row["alpha"] is not None
        assert all(row[kind] is None for kind in STREAMS)


def test_options_and_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="at least 1, not 0"):
        GateReport(every_n_updates=0)
    with pytest.raises(FewstepError, match=r"values\.csv' cannot be read"):
        read_gate_report(tmp_path)


def test_bars_are_as_long_as_their_values() -> None:
    image = bar_charts({"one": [1.0, None, -1.0, 0.5], "two": [0.0]})
    assert image.dtype == torch.uint8
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy())
    colour = tuple(int(COLOUR[i : i + 2], 16) for i in (1, 3, 5))
    lengths = [
        sum(drawn.getpixel((x, y)) == colour for y in range(HEIGHT + 40))
        for x in (80, 240, 400, 560)
    ]
    half, nothing, below, quarter = lengths
    assert nothing == 0
    assert half == pytest.approx(HEIGHT / 2, abs=2)
    assert below == pytest.approx(HEIGHT / 2, abs=2)
    assert quarter == pytest.approx(HEIGHT / 4, abs=2)
