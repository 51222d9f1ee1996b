from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import RingMixture, find_checkpoint, load_denoiser
from fewstep.networks.loading import read_checkpoint


def trained(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    network = RingMixture(VPSchedule(), width=16)
    torch.nn.init.normal_(network.outlet.weight)
    return Denoiser(network, VPSchedule(trajectory_end="clean"), "epsilon", alpha_floor=0.25)


def write(path: Path, **roles: Denoiser) -> Path:
    """A checkpoint as training writes it, with the given roles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = next(iter(roles.values())).to_spec()
    state = {f"{r}.{k}": v for r, d in roles.items() for k, v in d.state_dict().items()}
    torch.save({"fewstep": {"denoiser": spec}, "state_dict": state, "global_step": 7}, path)
    return path


def same(first: Denoiser, second: Denoiser) -> bool:
    x_t, t = torch.randn(4, 2), torch.tensor([999.0, 500.0, 20.0, 1.0])
    return torch.equal(first(x_t, t).x0, second(x_t, t).x0)


def test_a_checkpoint_gives_back_the_averaged_student_frozen(tmp_path: Path) -> None:
    student, ema = trained(0), trained(1)
    path = write(tmp_path / "last.ckpt", student=student, ema=ema)
    loaded = load_denoiser(path)
    assert same(loaded.denoiser, ema)
    assert loaded.denoiser.to_spec() == ema.to_spec()
    assert not loaded.denoiser.training
    assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
    assert (loaded.role, loaded.source) == ("ema", str(path))
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(load_denoiser(path, role="student").denoiser, student)


def test_without_an_average_the_student_is_taken_and_named(tmp_path: Path) -> None:
    student = trained(0)
    loaded = load_denoiser(write(tmp_path / "last.ckpt", student=student))
    assert same(loaded.denoiser, student)
    assert loaded.role == "student"


def test_a_role_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", student=trained(0))
    with pytest.raises(FewstepError, match="'teacher'"):
        load_denoiser(path, role="teacher")


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    student = trained(0)
    state = {f"student.{k}": v for k, v in student.state_dict().items() if "outlet" not in k}
    path = tmp_path / "last.ckpt"
    torch.save({"fewstep": {"denoiser": student.to_spec()}, "state_dict": state}, path)
    with pytest.raises(RuntimeError, match=r"outlet\.weight"):
        load_denoiser(path)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.flag,)


@pytest.mark.parametrize("plain", [False, True])
def test_an_unsafe_pickle_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    flag, path = tmp_path / "exploded", tmp_path / "last.ckpt"
    content = {"fewstep": {}, "state_dict": {}, "bomb": Bomb(flag)}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(FewstepError, match="is damaged" if plain else "more than plain tensors"):
        load_denoiser(path)
    assert not flag.exists()
    torch.load(path, weights_only=False) if not plain else pickle.loads(path.read_bytes())
    assert flag.exists()  # it would have gone off


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_reported(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "last.ckpt", student=trained(0))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FewstepError, match=r"last\.ckpt.* is damaged"):
        load_denoiser(path)


def test_a_file_that_is_no_checkpoint_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("these are notes, not weights")
    with pytest.raises(FewstepError, match=r"notes\.ckpt"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2, 3], torch.zeros(3)])
def test_a_checkpoint_of_another_program_is_reported(tmp_path: Path, content: object) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    with pytest.raises(FewstepError, match=r"foreign\.ckpt' is not a fewstep checkpoint"):
        load_denoiser(path)


def test_a_class_that_is_no_backbone_is_not_built(tmp_path: Path) -> None:
    path, spec = tmp_path / "last.ckpt", trained(0).to_spec()
    spec["backbone"] = {"class_path": "os.makedirs", "init_args": {"name": str(tmp_path / "made")}}
    torch.save({"fewstep": {"denoiser": spec}, "state_dict": {"student.x": torch.ones(1)}}, path)
    with pytest.raises(FewstepError, match=r"os\.makedirs"):
        load_denoiser(path)
    assert not (tmp_path / "made").exists()


def test_folders_resolve_to_the_newest_runs_last_checkpoint(tmp_path: Path) -> None:
    for version in (0, 2, 10):
        write(tmp_path / f"version_{version}/checkpoints/last.ckpt", student=trained(0))
    (tmp_path / "version_11").mkdir()  # a run that died before its first checkpoint
    newest = tmp_path / "version_10/checkpoints/last.ckpt"
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(tmp_path / "version_2").parts[-3] == "version_2"
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(str(newest)) == newest


def test_a_missing_run_says_how_to_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for where in ("runs/digits/teacher", "runs/digits/teacher/version_3"):
        with pytest.raises(FewstepError, match=r"fewstep fit -c experiments/digits/teacher\.yaml"):
            load_denoiser(where)
    with pytest.raises(FewstepError, match=r"elsewhere.*path of a \.ckpt file"):
        load_denoiser(tmp_path / "elsewhere")
