from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.errors import FewstepError
from fewstep.metrics.weights import WeightFile, file_sha256, fill, read_state

CONTENT = b"some weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FILE = WeightFile("net-1234.pth", "https://example.org/net-1234.pth", DIGEST[:8])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_a_missing_file_is_named_with_its_hash_source_and_place(cache: Path) -> None:
    with pytest.raises(FewstepError) as caught:
        FILE.locate()
    for part in (FILE.name, FILE.sha256, FILE.source, str(cache / FILE.name), "'weights'"):
        assert part in str(caught.value)
    with pytest.raises(FewstepError, match=r"no weights at '/nowhere/x\.pth'"):
        FILE.locate("/nowhere/x.pth")


def test_the_published_file_is_found_in_pytorchs_cache(cache: Path) -> None:
    (cache / FILE.name).write_bytes(CONTENT)
    assert FILE.locate() == cache / FILE.name


def test_a_published_name_with_other_content_is_refused(cache: Path) -> None:
    (cache / FILE.name).write_bytes(CONTENT + b"!")
    with pytest.raises(FewstepError, match="not the expected ones"):
        FILE.locate()


def test_a_given_file_may_be_any_unless_its_hash_is_given(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    path.write_bytes(b"own")
    own = hashlib.sha256(b"own").hexdigest()
    assert FILE.locate(str(path)) == path
    assert FILE.locate(str(path), own.upper()) == path
    with pytest.raises(FewstepError, match=f"{own}, not {DIGEST}"):
        FILE.locate(str(path), DIGEST)


def test_the_hash_of_several_files_is_that_of_their_bytes_in_a_row(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(CONTENT[:5])
    paths[1].write_bytes(CONTENT[5:])
    assert file_sha256(*paths) == DIGEST


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(nn.Linear(50, 50).state_dict(), path)
    assert read_state(path)["weight"].shape == (50, 50)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(FewstepError, match="cannot be read"):
        read_state(path)


class Payload:
    """Unpickled, it would call a function of its maker's choice."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path(self.target),))  # type: ignore[return-value]

    target = ""


def test_a_file_with_a_program_in_it_is_not_run(tmp_path: Path) -> None:
    Payload.target = str(tmp_path / "was_run")
    path = tmp_path / "net.pth"
    torch.save(Payload(), path)
    with pytest.raises(FewstepError, match="cannot be read"):
        read_state(path)
    assert not (tmp_path / "was_run").exists()


def test_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    target = nn.Linear(3, 2)
    fill(target, state, tmp_path)
    assert torch.equal(target.weight, state["weight"])
    for other in (nn.Linear(3, 4), nn.Linear(3, 2, bias=False)):
        with pytest.raises(FewstepError, match="another network than Linear"):
            fill(other, state, tmp_path)
