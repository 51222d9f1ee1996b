"""``fewstep evaluate`` of what others made: finished samples and diffusers pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from sklearn.datasets import load_digits

from fewstep.errors import FewstepError
from scripts.main import run

from shard_files import encoded, write_tar


def digits() -> list[np.ndarray[Any, Any]]:
    """The real digits, as 8-bit images."""
    return [np.round(image * (255 / 16)).astype(np.uint8) for image in load_digits().images]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(*arguments: str) -> list[dict[str, Any]]:
    run(["evaluate", "-c", "digits/lcm", *arguments])
    (path,) = Path("runs").rglob("results.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["measurements"]
    return found


def write_images(folder: Path, images: list[np.ndarray[Any, Any]]) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")


def test_the_data_themselves_as_samples_have_about_no_distance(here: Path) -> None:
    write_images(here / "theirs" / "deep", digits())
    (entry,) = measured("--samples", "theirs", "--steps", "4", "--guidance", "2.0")
    assert entry["metric"] == "frechet_digit_classifier"
    assert entry["value"] < 0.1  # training digits against all digits
    assert entry["num_samples"] == 1797
    assert (entry["role"], entry["num_steps"], entry["guidance_scale"]) == ("samples", 4, 2.0)
    assert Path("runs/samples/theirs/version_0/results.json").is_file()


def test_shards_and_folders_of_the_same_samples_measure_the_same(here: Path) -> None:
    images = [255 - image for image in digits()[:300]]
    write_images(here / "files", images)
    write_tar(here / "tars" / "a.tar", {f"{n:04d}.png": encoded(i) for n, i in enumerate(images)})
    (files,) = measured("--samples", "files", "--run.dir", "runs/a")
    found = Path("runs/a/samples/files/version_0/results.json")
    found.unlink()
    (tars,) = measured("--samples", "tars")
    assert files["num_samples"] == tars["num_samples"] == 300
    assert files["value"] == pytest.approx(tars["value"], rel=1e-6)
    assert files["value"] > 10


def test_only_as_many_samples_are_measured_as_were_asked_for(here: Path) -> None:
    write_images(here / "theirs", digits()[:50])
    (entry,) = measured("--samples", "theirs", "--num_samples", "20")
    assert entry["num_samples"] == 20


def test_a_damaged_sample_is_refused_and_named(here: Path) -> None:
    write_images(here / "theirs", digits()[:5])
    (here / "theirs" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(FewstepError, match=r"0003\.png.*cannot be decoded"):
        measured("--samples", "theirs")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: None, "no folder or shard"),
        (lambda folder: folder.mkdir(), "holds no"),
    ],
)
def test_a_folder_without_samples_is_refused(here: Path, make: Any, complaint: str) -> None:
    make(here / "theirs")
    with pytest.raises(FewstepError, match=complaint):
        measured("--samples", "theirs")


def test_samples_cannot_be_compared_with_data_that_hold_no_pixels(here: Path) -> None:
    write_images(here / "theirs", digits()[:5])
    with pytest.raises(FewstepError, match=r"RingData.*no images or videos"):
        run(["evaluate", "-c", "analytic/lcm", "--samples", "theirs"])


def tiny_pipeline(folder: Path) -> None:
    """An untrained class-conditional pipeline of 8 x 8 grey images."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)


def test_a_pipeline_is_measured_as_it_samples_by_itself(here: Path) -> None:
    tiny_pipeline(here / "pipe")
    options = ["--pipeline", "pipe", "--num_samples", "8", "--guidance", "1.5"]
    entries = measured(*options, "--steps", "1", "2")
    assert [e["num_steps"] for e in entries] == [1, 2]
    assert [e["network_evaluations"] for e in entries] == [2, 4]
    assert all(e["role"] == "pipeline" and e["guidance_scale"] == 1.5 for e in entries)
    assert all(e["protocol"]["sample_shape"] == [1, 8, 8] for e in entries)
    assert entries[0]["value"] != entries[1]["value"]


def test_a_folder_that_is_no_pipeline_is_refused(here: Path) -> None:
    (here / "pipe").mkdir()
    with pytest.raises(FewstepError, match=r"no model_index\.json"):
        measured("--pipeline", "pipe")
