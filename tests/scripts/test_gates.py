"""``fewstep gates`` on a tiny pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from callbacks import GateReport
from callbacks.gates import read_gate_report
from fewstep.errors import FewstepError
from fewstep.networks.gates import gate_values, gates_of, is_gated, load_gates, save_gates
from fewstep.networks.loading import METADATA_KEY
from fewstep.networks.parts import load_part
from fewstep.networks.pipelines import LoadedPipeline, load_denoiser_of
from scripts.evaluate.pipelines import PipelineSampler
from scripts.main import main, run

from tiny_transformers import loaded_by_diffusers, save_dit
from training_runs import data_for, method, trainer_of

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([999.0, 250.0])
COND = {"class_labels": torch.tensor([3, 7])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture
def pipeline(saved: Path) -> Path:
    for name in ("rdm_gates.json", "rdm_gates.safetensors"):
        (saved / "transformer" / name).unlink(missing_ok=True)
    return saved


def loaded(folder: Path) -> LoadedPipeline:
    return load_denoiser_of(folder, (16, 16))


def raw(pipeline: LoadedPipeline) -> Tensor:
    return pipeline.denoiser.raw(X, T, COND)


def gates_of_random_values(pipeline: Path) -> None:
    """Changes the gates beside a pipeline's network."""
    part = pipeline / "transformer"
    network = load_part(pipeline, "transformer")
    load_gates(network, part)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, gate in gates_of(network):
            for parameter in gate.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_gates(network, part)


def test_applied_gates_are_there_whenever_the_folder_is_read(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = loaded(pipeline)
    before = plain.sha256
    run(["gates", "apply", str(pipeline)])
    told = capsys.readouterr().out
    assert "transformer_blocks.1.ff.net.2.rdm_gate" in told
    assert "4 gates with 68 parameters: mode alpha_beta at the branch level, init identity." in told
    gated = loaded(pipeline)
    assert is_gated(gated.denoiser)
    assert torch.equal(raw(gated), raw(plain))
    assert gated.sha256 != before
    gates_of_random_values(pipeline)
    assert not torch.allclose(raw(loaded(pipeline)), raw(plain), atol=1e-3)
    measured = PipelineSampler(pipeline, [4])._pipeline.transformer
    wanted = loaded(pipeline).denoiser.backbone.network.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in measured.state_dict().items())
    assert measured.state_dict().keys() == wanted.keys()
    with pytest.raises(FewstepError, match="add --overwrite to replace them"):
        run(["gates", "apply", str(pipeline)])
    options = ["--mode", "full", "--level", "block", "--exclude", "blocks.0"]
    run(["gates", "apply", str(pipeline), "--overwrite", *options])
    (gate,) = [gate for _, gate in gates_of(loaded(pipeline).denoiser)]
    assert gate.get_parameter("kappa").item() == 0


def test_gates_beside_weights_in_half_precision_hide_them_not(
    pipeline: Path, tmp_path: Path
) -> None:
    run(["gates", "apply", str(pipeline)])
    shutil.copytree(pipeline / "transformer", tmp_path / "transformer")
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    expected = load_part(pipeline, "transformer").state_dict()
    for name, value in load_part(tmp_path, "transformer").state_dict().items():
        assert torch.equal(value, expected[name])


def test_merged_gates_need_nothing_of_fewstep(pipeline: Path, tmp_path: Path) -> None:
    run(["gates", "apply", str(pipeline)])
    gates_of_random_values(pipeline)
    run(["gates", "merge", str(pipeline), "--dest", str(tmp_path / "merged")])
    merged, gated = loaded(tmp_path / "merged"), loaded(pipeline)
    assert not is_gated(merged.denoiser)
    torch.testing.assert_close(raw(merged), raw(gated), atol=1e-5, rtol=1e-5)
    network = loaded_by_diffusers(tmp_path / "merged").transformer
    own = merged.denoiser.backbone.network.state_dict()
    assert network.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    with pytest.raises(FewstepError, match="is not empty"):
        run(["gates", "merge", str(pipeline), "--dest", str(tmp_path / "merged")])


def test_the_report_says_what_gates_have_become(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["gates", "apply", str(pipeline)])
    gates_of_random_values(pipeline)
    capsys.readouterr()
    run(["gates", "report", str(pipeline), "--picture", str(tmp_path / "gates.png")])
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["gate", "alpha", "spread", "|beta|"]
    denoiser = loaded(pipeline).denoiser
    for line, (name, gate) in zip(told[1:5], gates_of(denoiser.backbone.network), strict=True):
        alpha, beta = 1 + gate.get_parameter("delta").item(), gate.get_parameter("beta").norm()
        assert line.split() == [name, f"{alpha:.4f}", "0.0000", f"{beta:.4f}"]
    with Image.open(tmp_path / "gates.png") as image:
        assert len(image.getcolors(1 << 24) or ()) > 3
    state = {f"ema.{name}": value for name, value in denoiser.state_dict().items()}
    checkpoint = {METADATA_KEY: {"denoiser": denoiser.to_spec()}, "state_dict": state}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    run(["gates", "report", str(tmp_path / "last.ckpt")])
    assert capsys.readouterr().out.splitlines() == told[:5]


def test_the_report_of_a_run_says_what_was_seen_of_its_streams_by_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, report = method("gated"), GateReport(every_n_updates=1, pictures=False)
    trainer = trainer_of("single", 1, 2, report, folder=tmp_path)
    trainer.fit(module, data_for("gated"))
    (tmp_path / "checkpoints").mkdir()
    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    run(["gates", "report", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert told[5:7] == ["", "Seen of the student in update 2, from its input to its output:"]
    names = ["gate", "alpha", "|beta|", "unit", "/", "stream", "cosine", "block", "/", "stream"]
    assert told[7].split() == [*names, "stream", "gradient"]
    rows = read_gate_report(tmp_path)[-4:]
    assert [line.split()[0] for line in told[8:]] == [row["gate"] for row in rows]
    kinds = ("alpha", "beta", "unit", "cosine", "ratio", "stream", "gradient")
    for line, row in zip(told[8:], rows, strict=True):
        numbers = [float(cell) for cell in line.split()[1:]]
        assert numbers == pytest.approx([row[kind] for kind in kinds], rel=1e-3)
    assert rows[0]["unit"] != pytest.approx(rows[1]["unit"], rel=0.01)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    run(["gates", "report", str(checkpoint)])
    assert capsys.readouterr().out.splitlines() == told
    shutil.rmtree(tmp_path / "gates")
    run(["gates", "report", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == told[:5]


def test_values_come_in_the_order_of_numbers() -> None:
    tensors = {f"blocks.{i}.rdm_gate.delta": torch.tensor([i / 10, 0.0]) for i in (10, 9, 2)}
    tensors["up.rdm_skip.sigma"] = torch.tensor([0.5, 1.5])
    values = gate_values(tensors)
    assert [value.name for value in values] == [
        *("blocks.2.rdm_gate", "blocks.9.rdm_gate", "blocks.10.rdm_gate", "up.rdm_skip")
    ]
    assert (values[0].alpha, values[0].spread) == (pytest.approx(1.1), pytest.approx(0.1))
    assert (values[3].alpha, values[3].skip) == (None, pytest.approx(2.0))


def test_what_cannot_be_done_is_said(pipeline: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (["apply", str(pipeline), "--mode", "none"], "make no gates"),
        (["apply", str(pipeline), "--mode", "full"], "Set gates.level: block"),
        (["merge", str(pipeline), "--dest", str(tmp_path / "a")], "as `fewstep gates apply`"),
        (["report", str(pipeline)], "as `fewstep gates apply`"),
        (["apply", str(tmp_path)], "is no folder of a diffusers pipeline"),
        (["merge", str(tmp_path), "--dest", "a"], "is no folder of a diffusers pipeline"),
    ):
        with pytest.raises(FewstepError, match=told):
            run(["gates", *arguments])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("init", ["depth", "ode", "zero"])
def test_gates_that_would_spoil_trained_weights_are_refused(pipeline: Path, init: str) -> None:
    with pytest.raises(FewstepError, match=r"would change what its trained .* from scratch"):
        run(["gates", "apply", str(pipeline), "--init", init])
    assert not (pipeline / "transformer" / "rdm_gates.json").exists()


@pytest.mark.parametrize("inside", ["merged", "transformer/merged"])
def test_a_pipeline_is_not_merged_into_its_own_folder(
    pipeline: Path, inside: str, tmp_path: Path
) -> None:
    run(["gates", "apply", str(pipeline)])
    source = Path(shutil.copytree(pipeline, tmp_path / "source"))
    with pytest.raises(FewstepError, match="lies within"):
        run(["gates", "merge", str(source), "--dest", str(source / inside)])
    assert sorted(p.name for p in source.rglob("*")) == sorted(p.name for p in pipeline.rglob("*"))


def test_to_merge_the_gates_of_a_run_it_is_exported(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    for source in (tmp_path / "run", checkpoint):
        with pytest.raises(FewstepError, match=f"`fewstep export {source}"):
            run(["gates", "merge", str(source), "--dest", str(tmp_path / "a")])


@pytest.mark.parametrize("action", [[], ["apply"], ["merge"], ["report"]])
def test_help_tells_what_there_is(action: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gates", *action, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert (action or ["apply"])[0] in told
    assert max(map(len, told.splitlines())) <= 100
    assert "--init depth" not in told
