"""Training on encoded shards, from the command that encodes them to the student that is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fewstep.errors import FewstepError
from fewstep.networks.loading import load_denoiser
from fewstep.networks.pipelines import load_denoiser_of, read_null
from scripts.main import run

from tiny_experiments import teacher, two_updates, write_shard
from tiny_pipelines import save_stable_diffusion

TEXT_PARTS = ("text_encoder", "tokenizer")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encode(folder: Path, pipeline: Path) -> Path:
    for part in ("train", "val"):
        write_shard(folder / "raw" / f"{part}-000000.tar", None)
    command = ["shards", "encode", "raw", "--pipeline", str(pipeline), "--dest", "encoded"]
    run([*command, "--size", "16", "--workers", "0"])
    return folder / "encoded"


def on_encoded(pipeline: Path, shards: Path) -> str:
    """What makes sd15/pcm_4_encoded small, and nothing else of it."""
    config: dict[str, Any] = {
        "trainer": two_updates(),
        "model": {
            "init_args": {
                "teacher": teacher(pipeline, empty=str(shards / "empty.safetensors")),
                "num_grid_points": 20,
            }
        },
        "data": {
            "init_args": {
                "shards": str(shards / "train-*.tar"),
                "val_shards": str(shards / "val-*.tar"),
                "batch_size": 2,
                "num_workers": 0,
            }
        },
    }
    Path("small.yaml").write_text(yaml.safe_dump(config))
    return "small.yaml"


def test_encoded_shards_train_and_draw_without_a_text_encoder(here: Path) -> None:
    pytest.importorskip("peft")
    pipeline = save_stable_diffusion(here / "pipeline")
    shards = encode(here, pipeline)
    whole = load_denoiser_of(pipeline).text
    for part in TEXT_PARTS:
        shutil.rmtree(pipeline / part)
    with pytest.raises(FewstepError, match="has no 'text_encoder'"):
        load_denoiser_of(pipeline)

    config = on_encoded(pipeline, shards)
    run(["fit", "-c", "sd15/pcm_4_encoded", "-c", config, "--run.name", "tiny"])
    version = Path("runs/tiny/version_0")
    assert list((version / "samples").glob("*.png"))
    read = load_denoiser(version).denoiser
    null = read.backbone.get_buffer("null_encoder_hidden_states")
    # Stored in half precision, of an embedding of about one.
    expected = whole.null()["encoder_hidden_states"]
    torch.testing.assert_close(null, expected, atol=2e-3, rtol=2e-3)
    assert null.any()


def test_the_null_condition_is_that_of_one_sample(here: Path) -> None:
    shards = encode(here, save_stable_diffusion(here / "pipeline"))
    file = shards / "empty.safetensors"
    (name, value), *rest = load_file(file).items()
    assert not rest
    assert torch.equal(read_null(file)[name][0], value)
    with pytest.raises(FewstepError, match=r"shards encode.* writes it as empty\.safetensors"):
        read_null(here / "nowhere.safetensors")
