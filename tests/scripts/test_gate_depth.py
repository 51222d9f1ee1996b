"""``fewstep gates grow`` and ``fewstep gates prune``, on checkpoints and on a tiny pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import UViT, load_denoiser
from fewstep.networks.gates import ResidualGates, apply_gates, gates_of, is_gated
from fewstep.networks.loading import METADATA_KEY
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules.chains import Chain
from scripts.gates import depth
from scripts.gates.depth import run_on_own_samples
from scripts.main import run

from tiny_pipelines import save_stable_diffusion
from tiny_students import save_student
from tiny_transformers import loaded_by_diffusers, save_dit
from training_runs import method

ALPHAS = (1.0, 0.0, 0.5, 0.25)


def saved(folder: Path, gated: bool = True, num_classes: int | None = 3) -> Path:
    """A checkpoint of a chain of blocks that count for less and less, but for one."""
    torch.manual_seed(0)
    backbone = UViT(
        8, 1, num_layers=4, num_heads=2, head_dim=8, num_classes=num_classes, long_skips=False
    )
    denoiser = Denoiser(backbone, VPSchedule(), "v_prediction")
    if gated:
        apply_gates(denoiser, ResidualGates())
        for block, alpha in zip(backbone.blocks, ALPHAS, strict=True):
            for _, gate in gates_of(block):
                nn.init.constant_(gate.get_parameter("delta"), alpha - 1)
    state = {f"ema.{name}": value for name, value in denoiser.state_dict().items()}
    metadata = {"denoiser": denoiser.to_spec(), "run": "kept"}
    torch.save({METADATA_KEY: metadata, "state_dict": state}, folder / "last.ckpt")
    return folder / "last.ckpt"


def raw(denoiser: Denoiser) -> Tensor:
    x = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": torch.tensor([0, 2])}
    return denoiser.raw(x, torch.tensor([900.0, 100.0]), labels)


def test_a_checkpoint_grows_and_computes_nearly_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dest = saved(tmp_path), tmp_path / "new" / "grown.ckpt"
    run(["gates", "grow", str(source), "--dest", str(dest)])
    assert f"8 blocks now, 4 before: {dest}" in capsys.readouterr().out
    before, after = load_denoiser(source).denoiser, load_denoiser(dest).denoiser
    assert len(after.backbone.feature_blocks) == 8
    torch.testing.assert_close(raw(after), raw(before), rtol=0.1, atol=0.1)
    assert not torch.equal(raw(after), raw(before))
    assert torch.load(dest, weights_only=True)[METADATA_KEY]["run"] == "kept"
    with pytest.raises(FewstepError, match="is there already"):
        run(["gates", "grow", str(source), "--dest", str(dest)])


def test_new_blocks_of_zeros_leave_a_checkpoint_and_a_pipeline_what_they_compute(
    tmp_path: Path,
) -> None:
    source, dest = saved(tmp_path), tmp_path / "grown.ckpt"
    run(["gates", "grow", str(source), "--new-blocks", "zero", "--dest", str(dest)])
    before, after = load_denoiser(source).denoiser, load_denoiser(dest).denoiser
    assert len(after.backbone.feature_blocks) == 8
    assert torch.equal(raw(after), raw(before))
    pipeline, deeper = save_dit(tmp_path / "dit"), tmp_path / "deeper"
    run(["gates", "apply", str(pipeline)])
    run(["gates", "grow", str(pipeline), "--new-blocks", "zero", "--dest", str(deeper)])
    before, after = (load_denoiser_of(folder, (16, 16)).denoiser for folder in (pipeline, deeper))
    assert len(after.backbone.feature_blocks) == 2 * len(before.backbone.feature_blocks)
    x = torch.randn(2, *before.sample_shape, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([900.0, 100.0]), {"class_labels": torch.tensor([0, 2])}
    assert torch.equal(after.raw(x, *given), before.raw(x, *given))


@pytest.mark.parametrize("num_classes", [3, None])
def test_the_blocks_that_add_least_on_own_samples_go(
    num_classes: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dest = saved(tmp_path, num_classes=num_classes), tmp_path / "pruned.ckpt"
    options = ["--blocks", "2", "--samples", "4", "--steps", "3"]
    run(["gates", "prune", str(source), *options, "--dest", str(dest)])
    assert f"Without the blocks 1, 3 (from 0): {dest}" in capsys.readouterr().out
    assert len(load_denoiser(dest).denoiser.backbone.feature_blocks) == 2


def test_networks_without_gates_are_pruned_and_do_not_grow(tmp_path: Path) -> None:
    source, dest = saved(tmp_path, gated=False), tmp_path / "new.ckpt"
    with pytest.raises(FewstepError, match="Only a gated network can grow"):
        run(["gates", "grow", str(source), "--dest", str(dest)])
    assert not dest.exists()
    run(["gates", "prune", str(source), "--blocks", "3", "--dest", str(dest)])
    assert len(load_denoiser(dest).denoiser.backbone.feature_blocks) == 1


def test_a_pipeline_grows_with_its_gates_and_is_pruned(tmp_path: Path) -> None:
    source, dest, short = save_dit(tmp_path / "dit"), tmp_path / "grown", tmp_path / "short"
    with pytest.raises(FewstepError, match="as `fewstep gates apply`"):
        run(["gates", "grow", str(source), "--dest", str(dest)])
    run(["gates", "apply", str(source)])
    run(["gates", "grow", str(source), "--dest", str(dest)])
    before, after = (load_denoiser_of(folder, (16, 16)).denoiser for folder in (source, dest))
    assert len(after.backbone.feature_blocks) == 2 * len(before.backbone.feature_blocks)
    assert is_gated(after)
    assert {1 + gate.get_parameter("delta").item() for _, gate in gates_of(after)} == {0.5}
    run(["gates", "prune", str(dest), "--blocks", "1", "--steps", "2", "--dest", str(short)])
    assert len(load_denoiser_of(short, (16, 16)).denoiser.backbone.feature_blocks) == 3
    assert len(loaded_by_diffusers(short).transformer.transformer_blocks) == 3


def test_networks_that_need_prompts_are_refused(tmp_path: Path) -> None:
    source = save_stable_diffusion(tmp_path / "sd")
    with pytest.raises(FewstepError, match="needs prompts to sample"):
        run(["gates", "prune", str(source), "--blocks", "1", "--dest", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


def test_students_are_pruned_on_samples_that_they_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains: list[Chain] = []

    def seen(denoiser: object, chain: Chain, *rest: object) -> None:
        chains.append(chain)
        run_on_own_samples(denoiser, chain, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(depth, "run_on_own_samples", seen)
    module = method("lcm", ema_decay=None)
    save_student(module, tmp_path / "student.ckpt")
    depth.prune_depth(str(tmp_path / "student.ckpt"), tmp_path / "short.ckpt", 1)
    assert chains[0].renoise
    assert chains[0].num_steps == module.step_counts()[-1]
