"""Plans of networks with residual gates."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.main import run as fewstep

pytestmark = pytest.mark.threads


@pytest.mark.parametrize("init", ["ode", "zero"])
def test_gates_can_be_set_in_an_experiment_and_planned(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.gates.mode=alpha", f"--model.gates.init={init}", "--model.gates_lr=2"]
    fewstep(["plan", "-c", "digits/teacher", *options])
    assert "student" in capsys.readouterr().out
