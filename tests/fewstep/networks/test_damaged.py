"""Files that are no checkpoints, wherever a checkpoint is read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.networks.loading import read_checkpoint
from fewstep.networks.sharded import read_remainder, read_tensors
from lightning_modules.whole import WholeCheckpointIO, read_whole
from scripts.main import main


class Other:
    """What a file of plain tensors does not hold."""


def write(path: Path, kind: str) -> Path:
    """A file that is no checkpoint of a run."""
    torch.save({"state_dict": {"x": torch.ones(999)}}, path)
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Other()))
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    return path


KINDS = ("text", "empty", "cut short", "pickle", "noise")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_reader_says_the_same_of_it(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    file = write(tmp_path / "bad.ckpt", kind)
    for name in (".metadata", "meta.pt"):
        (folder / name).write_bytes(file.read_bytes())
    readers = [
        (read_checkpoint, file),
        (lambda path: WholeCheckpointIO().load_checkpoint(path, weights_only=True), file),
        (read_remainder, folder),
        (lambda path: read_tensors(path, "x"), folder),
        (read_whole, folder),
    ]
    for read, path in readers:
        with pytest.raises(FewstepError) as refused:
            read(path)
        assert str(refused.value) == (
            f"'{path}' is no checkpoint, or is damaged. Give another, such as an earlier one of "
            "the run's checkpoints/."
        )


@pytest.mark.parametrize("content", [[1], {"a": 1}, {"state_dict": {}}])
def test_a_file_of_something_else_is_no_checkpoint_to_go_on_from(
    content: object, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(FewstepError, match="is no checkpoint, or is damaged"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "other.ckpt", weights_only=True)


def test_a_checkpoint_that_may_not_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"cannot be read: .*No such file"):
        read_checkpoint(tmp_path / "missing.ckpt")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "-c", "digits/teacher", "--ckpt_path", "bad.ckpt"],
        ["fit", "-c", "digits/pcm_4", "--model.init_args.teacher", "bad.ckpt"],
    ],
)
def test_a_command_given_one_says_so_and_recommends_nothing_unsafe(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("bad.ckpt"), "cut short")
    assert main([*arguments, "--trainer.accelerator", "cpu", "--trainer.callbacks=[]"]) == 2
    said = capsys.readouterr().err
    assert "error: 'bad.ckpt' is no checkpoint, or is damaged." in said
    assert "weights_only" not in said
