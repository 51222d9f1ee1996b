"""``fewstep export``: what it refuses, and what it says then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.networks.loading import METADATA_KEY
from lightning_modules import ConsistencyDistillation

from rings import ring_teacher
from tiny_pipelines import save_stable_diffusion, save_stable_diffusion_xl
from tiny_students import export, save_run, save_student, sd_student


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_run(save_stable_diffusion(folder / "base"), folder / "version_0")
    return folder / "base"


@pytest.fixture
def trained(base: Path) -> Path:
    return base.with_name("version_0")


def test_a_folder_that_is_taken_is_left_alone(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FewstepError, match=r"not empty; give another --dest, or add --overwrite"):
        export(trained, "--dest", out)
    with pytest.raises(FewstepError, match=r"is no earlier export .* will not delete it"):
        export(trained, "--dest", out, "--overwrite")
    assert (out / "mine.txt").read_text() == "mine"


def test_an_earlier_export_is_replaced_only_when_asked_to(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(trained, "--dest", out)
    (out / "stray").touch()
    with pytest.raises(FewstepError, match="not empty"):
        export(trained, "--dest", out)
    with pytest.raises(FewstepError, match="serves 4 sampling steps, not 3"):
        export(trained, "--dest", out, "--overwrite", "--steps", 3)
    assert (out / "stray").exists()  # what fails leaves the earlier one
    export(trained, "--dest", out, "--overwrite")
    assert not (out / "stray").exists()


def test_a_pipeline_of_another_architecture_is_refused(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    other = save_stable_diffusion_xl(tmp_path / "xl")
    with pytest.raises(FewstepError, match=r"is a StableDiffusionXLPipeline, .* StableDiffusion\."):
        export(trained, "--dest", tmp_path / "out", "--pipeline", other)
    wider = Path(shutil.copytree(base, tmp_path / "wider"))
    config = json.loads((wider / "unet" / "config.json").read_text())
    config["block_out_channels"] = [16, 32]
    (wider / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewstepError, match=r"block_out_channels \[16, 32\] there, \[8, 16\] here"):
        export(trained, "--dest", tmp_path / "out", "--pipeline", wider)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_or_lacks_a_part_is_named(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content[METADATA_KEY]["frozen"]["teacher"]["pipeline"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "moved.ckpt")
    with pytest.raises(FewstepError, match=r"gone', which the checkpoint names, is not here"):
        export(tmp_path / "moved.ckpt", "--dest", tmp_path / "out")
    content[METADATA_KEY]["frozen"] = {"teacher": {"source": "StableDiffusion"}}
    torch.save(content, tmp_path / "nameless.ckpt")
    with pytest.raises(FewstepError, match=r"does not say from which pipeline .* --pipeline"):
        export(tmp_path / "nameless.ckpt", "--dest", tmp_path / "out")
    lacking = Path(shutil.copytree(base, tmp_path / "lacking"))
    shutil.rmtree(lacking / "tokenizer")
    with pytest.raises(FewstepError, match="has no 'tokenizer'"):
        export(trained, "--dest", tmp_path / "out", "--pipeline", lacking)


def test_a_base_with_another_network_than_the_teachers_is_noted(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "unet" / "notes.txt").write_text("changed")
    export(trained, "--dest", tmp_path / "out", "--pipeline", other)
    assert "is not the teacher's (their hashes differ)" in capsys.readouterr().out


def test_students_that_diffusers_cannot_hold_are_refused(base: Path, tmp_path: Path) -> None:
    ring = ConsistencyDistillation(teacher=ring_teacher)
    save_student(ring, tmp_path / "ring.ckpt")
    with pytest.raises(FewstepError, match="A RingMixture is no network of diffusers'"):
        export(tmp_path / "ring.ckpt", "--dest", tmp_path / "out")
    sd_student(base, tmp_path / "floor.ckpt", num_phases=1, alpha_floor=0.5)
    with pytest.raises(FewstepError, match="train it without alpha_floor"):
        export(tmp_path / "floor.ckpt", "--dest", tmp_path / "out")
    with pytest.raises(FewstepError, match="switch guidance off at scales up to 1"):
        export(tmp_path / "floor.ckpt", "--dest", tmp_path / "out", "--guidance", 0.5)
    with pytest.raises(FewstepError, match="is no LoRA; leave --adapter out"):
        export(tmp_path / "floor.ckpt", "--dest", tmp_path / "out", "--adapter")
    with pytest.raises(FewstepError, match="No checkpoint at"):
        export(tmp_path / "nowhere", "--dest", tmp_path / "out")


def test_what_a_stochastic_chain_loses_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd_student(base, tmp_path / "student.ckpt", num_phases=2, stochasticity=0.5)
    export(tmp_path / "student.ckpt", "--dest", tmp_path / "out")
    said = "stochasticity 0.5, which no scheduler of diffusers does: only its deterministic chain"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()
