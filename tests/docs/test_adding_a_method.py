"""The page about methods of one's own: what it prints works as printed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from callbacks import Checkpoints
from lightning_modules import FewStepModule, chains
from scripts.main import run

from tiny_experiments import two_updates
from training_runs import OPTIONS, Data, assert_same_run, states_of, teacher, trained, trainer_of

PAGE = "adding_a_method.md"
TINY = ["num_layers=1", "num_heads=2", "head_dim=8"]  # of digits/teacher's network


@pytest.fixture
def page(
    blocks: Callable[[str, str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The page's method, imported from an empty working directory that has the page's files."""
    files = ("progressive.py", "chain.py", "test_progressive.py")
    for name, code in zip(files, blocks(PAGE, "python"), strict=True):
        Path(tmp_path, name).write_text(code)
    (experiment,) = blocks(PAGE, "yaml")
    Path(tmp_path, "halved_8.yaml").write_text(experiment)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("progressive")
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def made(page: ModuleType, **options: Any) -> FewStepModule:
    method: FewStepModule = page.ProgressiveDistillation(teacher, 4, **{**OPTIONS, **options})
    return method


def test_its_method_resumes_bit_for_bit(page: ModuleType, tmp_path: Path) -> None:
    found = []
    for resumed in (None, tmp_path / "checkpoints" / "update_00000002.ckpt"):
        module = made(page, accumulate=2)
        saves = Checkpoints(every_n_updates=2, keep=None)
        trainer = trainer_of("single", 1, 4, saves, folder=tmp_path)
        trainer.fit(module, Data(), ckpt_path=resumed, weights_only=True)
        found.append(states_of(trainer, module))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_its_method_trains_on_two_ranks_as_on_one_device(
    kind: str, page: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training_runs.method", lambda name, **options: made(page, **options))
    (alone,) = trained(1, "single", "page")
    for rank in trained(2, kind, "page"):
        assert_same_run(rank, alone)


@pytest.mark.slow
def test_its_experiment_trains_and_draws_the_student_at_its_own_steps(page: ModuleType) -> None:
    small = {"trainer": two_updates(), "data": {"init_args": {"batch_size": 16}}}
    Path("small.yaml").write_text(yaml.safe_dump(small))
    given = [f"--model.init_args.backbone.init_args.{option}" for option in TINY]
    name = ["--run.name", "digits/teacher"]
    run(["fit", "-c", "digits/teacher", "-c", "small.yaml", *name, *given])
    later = ["-c", "digits/defaults", "-c", "small.yaml", "-c", "halved_8.yaml"]
    run(["fit", *later, "--trainer.max_steps", "2"])
    folder = Path("runs/halved_8/version_0")
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["fewstep"]["method"] == "ProgressiveDistillation"
    assert saved["fewstep"]["num_steps"] == 8
    assert [path.name for path in (folder / "samples").iterdir()] == ["00000002_ema_8_steps.png"]


def test_its_chain_samples_as_the_method_does(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "CHAINS", dict(chains.CHAINS))
    importlib.import_module("chain")
    module = made(page)
    module.configure_model()
    chain = chains.chain_of(module.record("student"), module.student.schedule, 4)
    noise = torch.randn(3, *module.sample_shape, generator=torch.Generator().manual_seed(0))
    cond = {"class_labels": torch.arange(3)}
    sampled = chain.sample(module.student, noise, cond)
    assert torch.equal(sampled, module.sample(noise, cond, 4, role="student"))
    assert not torch.equal(sampled, noise)


def test_its_own_test_passes(page: ModuleType) -> None:
    tests = importlib.import_module("test_progressive")
    tests.test_training_closes_most_of_the_gap_to_the_teachers_own_steps()
