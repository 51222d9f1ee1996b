"""What ``fewstep evaluate --samples`` says of samples that are not as the experiment's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from callbacks import Evaluation
from datamodules import Shards
from datamodules.fields import Images
from fewstep.metrics import SlicedWasserstein
from scripts.evaluate import FinishedSamples
from scripts.trainer import FewstepTrainer

from rings import quiet_trainer
from shard_files import encoded, write_tar


def write_images(folder: Path, count: int, width: int, height: int) -> Path:
    folder.mkdir()
    pixels = np.zeros((height, width), dtype=np.uint8)
    for number in range(count):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Shards:
    write_tar(tmp_path / "own" / "a.tar", {"0.png": encoded(np.zeros((8, 8), dtype=np.uint8))})
    own = str(tmp_path / "own")
    return Shards(own, own, 4, Images(size=8, channels=1), cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("count", "width", "height", "said"),
    [
        (6, 40, 40, "6 files (the experiment measures 32), resized from 40 x 40 to 8 x 8."),
        (32, 40, 24, "Resized from 40 x 24 to 8 x 8."),
        (33, 8, 8, "33 files (the experiment measures 32)."),
        (32, 8, 8, None),
    ],
)
def test_files_that_are_few_or_of_another_size_are_told_of(
    count: int, width: int, height: int, said: str | None, data: Shards, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "theirs", count, width, height)
    assert FinishedSamples(folder, data).note(32) == said


def test_shards_are_counted_in_samples(data: Shards, tmp_path: Path) -> None:
    assert FinishedSamples(tmp_path / "own", data).note(2) == (
        "1 sample (the experiment measures 2)."
    )


def test_evaluate_says_so_once(
    data: Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_images(tmp_path / "theirs", 6, 40, 40)
    monkeypatch.setattr(FewstepTrainer, "_run_validation", lambda *given: None)
    callback = Evaluation([SlicedWasserstein()], num_samples=64)
    trainer = quiet_trainer(tmp_path, [callback], 1, FewstepTrainer)
    trainer.evaluate(None, data, samples=str(folder))
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "6 files (the experiment measures 64), resized from 40 x 40 to 8 x 8."
    trainer.evaluate(None, data, samples=str(folder), num_samples=6)
    assert capsys.readouterr().out.startswith("Resized from 40 x 40 to 8 x 8.\n")
