"""Encoding shards: the same numbers as the pipeline gives, however the work is divided."""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DiffusionPipeline,
    TextToVideoSDPipeline,
    WanPipeline,
)
from torch import Tensor

from datamodules.fields import Images, Latents, Tensors, Videos
from datamodules.fields.tensors import read_safetensors
from datamodules.index import ShardIndex, scan
from datamodules.moving_clips import Scene, moving_digits_record
from fewstep.errors import FewstepError
from scripts.shards import encoding, main
from scripts.shards.encode import part_of_work
from scripts.shards.encoding import noise
from scripts.shards.pipelines import Encoder, LatentSpace
from scripts.shards.tars import PARTIAL

from shard_files import encoded, write_tar
from tiny_pipelines import (
    save_stable_diffusion,
    save_stable_diffusion_xl,
    save_text_to_video,
    tiny_vae,
)
from tiny_transformers import save_wan

COUNT = 5


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    save_stable_diffusion(folder / "sd")
    save_stable_diffusion(folder / "tiny", tiny_vae())
    save_stable_diffusion_xl(folder / "xl")
    save_wan(folder / "wan")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of five images with captions and labels; one image is damaged."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(COUNT):
            key = f"{shard}-{number}"
            members[f"{key}.png"] = encoded(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            members[f"{key}.txt"] = f"caption {'abc'[shard]} {'vwxyz'[number]}".encode()
            members[f"{key}.cls"] = str(number).encode()
        if shard == 2:
            members["2-3.png"] = members["2-3.png"][:60]
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    members: dict[str, bytes] = {}
    for number in range(2):
        made = moving_digits_record(number, 0, "clear", "train", Scene(num_frames=5, size=16))
        members[f"{number}.mp4"] = made["mp4"]
        members[f"{number}.txt"] = made["txt"].encode()
    write_tar(folder / "part-0.tar", members)
    return folder


def encode(source: Path, pipeline: Path, dest: Path, *options: str, workers: int = 0) -> Path:
    arguments = [str(source), "--pipeline", str(pipeline), "--dest", str(dest)]
    main(["encode", *arguments, "--dtype", "fp32", "--workers", str(workers), *options])
    return dest


def read(folder: Path) -> dict[str, dict[str, bytes]]:
    """The parts of all records of a folder's shards."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        data, index = path.read_bytes(), ShardIndex.load(Path(f"{path}.index"))
        for number, key in enumerate(index.keys):
            parts = index.record(number, str(path)).parts
            found[key] = {e: data[at : at + size] for e, (at, size) in parts.items()}
    return found


def pixels(folder: Path, key: str, size: tuple[int, int]) -> Tensor:
    images = Images(size)
    return images.finish(images.decode(_part(folder, key, "png"), "png", None).value[None])


def _part(folder: Path, key: str, extension: str) -> bytes:
    for path in sorted(folder.glob("*.tar")):
        index = scan(path)
        if key in index.keys:
            at, size = index.record(index.keys.index(key), str(path)).parts[extension]
            return path.read_bytes()[at : at + size]
    raise KeyError(key)


def latent(parts: dict[str, bytes]) -> Tensor:
    value = Latents().decode(parts["latent.safetensors"], "latent.safetensors", None).value
    assert isinstance(value, Tensor)
    return value


def conditions(parts: dict[str, bytes]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = (
        Tensors().decode(parts["text.safetensors"], "text.safetensors", None).value
    )
    return found


@pytest.mark.parametrize("kind", ["sample", "mean", "moments"])
def test_latents_and_text_are_those_of_the_pipeline(
    tmp_path: Path, pipelines: Path, images: Path, kind: str
) -> None:
    found = read(encode(images, pipelines / "sd", tmp_path, "--latents", kind))
    pipe = DiffusionPipeline.from_pretrained(pipelines / "sd")
    assert sorted(found) == [f"{s}-{n}" for s in range(3) for n in range(COUNT) if (s, n) != (2, 3)]
    for key in ("0-0", "1-4", "2-4"):
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels(images, key, (16, 16))).latent_dist
            text, _ = pipe.encode_prompt(found[key]["txt"].decode(), "cpu", 1, False)
        mean, std = (posterior.mean[0] - 0.25) * 0.5, posterior.std[0] * 0.5
        stored = read_safetensors(found[key]["latent.safetensors"])
        if kind == "moments":
            torch.testing.assert_close(stored, {"mean": mean, "std": std}, atol=1e-5, rtol=1e-4)
        else:
            drawn = mean + std * noise(0, key, mean.shape) if kind == "sample" else mean
            torch.testing.assert_close(stored, {"latent": drawn}, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            conditions(found[key]), {"encoder_hidden_states": text[0]}, atol=1e-5, rtol=1e-4
        )
        assert found[key]["cls"] == key[-1:].encode()


def test_noise_is_normal_and_depends_on_seed_and_key_alone() -> None:
    drawn = noise(0, "a", (4, 64, 64))
    assert torch.equal(drawn, noise(0, "a", (4, 64, 64)))
    for other in (noise(1, "a", (4, 64, 64)), noise(0, "b", (4, 64, 64))):
        assert abs(float((drawn * other).mean())) < 0.05
    assert abs(float(drawn.mean())) < 0.05
    assert abs(float(drawn.std()) - 1) < 0.05


def test_a_latent_space_may_have_channels_of_its_own() -> None:
    config = {"latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0], "scaling_factor": 3.0}
    found = LatentSpace.of(config).normalised(torch.tensor([[5.0, 10.0]])[..., None, None])
    assert found.flatten().tolist() == [6.0, 6.0]


def test_the_empty_prompt_is_stored_for_guidance(
    tmp_path: Path, pipelines: Path, images: Path
) -> None:
    dest = encode(images, pipelines / "sd", tmp_path)
    found = read_safetensors((dest / "empty.safetensors").read_bytes())
    pipe = DiffusionPipeline.from_pretrained(pipelines / "sd")
    with torch.no_grad():
        expected, _ = pipe.encode_prompt("", "cpu", 1, False)
    torch.testing.assert_close(found, {"encoder_hidden_states": expected[0]}, atol=1e-5, rtol=1e-4)


def test_sdxl_has_pooled_text_and_its_own_empty_prompt(
    tmp_path: Path, pipelines: Path, images: Path
) -> None:
    dest = encode(images, pipelines / "xl", tmp_path, "--latents", "mean")
    found = read(dest)["0-1"]
    pipe = DiffusionPipeline.from_pretrained(pipelines / "xl")
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            found["txt"].decode(), device="cpu", do_classifier_free_guidance=False
        )
        mean = pipe.vae.encode(pixels(images, "0-1", (16, 16))).latent_dist.mean[0]
    expected = {"encoder_hidden_states": text[0], "text_embeds": pooled[0]}
    torch.testing.assert_close(conditions(found), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latent(found), mean * 0.13, atol=1e-5, rtol=1e-4)
    empty = read_safetensors((dest / "empty.safetensors").read_bytes())
    assert empty["text_embeds"].shape == pooled[0].shape
    assert not empty["encoder_hidden_states"].any()  # SDXL's unconditional branch gets zeros


def test_videos_are_encoded_frame_by_frame_by_an_image_vae(
    tmp_path: Path, pipelines: Path, videos: Path
) -> None:
    dest = encode(videos, pipelines / "sd", tmp_path, "--frames", "5", "--latents", "mean")
    found = latent(read(dest)["1"])
    clips = Videos(5, 16)
    clip = clips.finish(clips.decode(_part(videos, "1", "mp4"), "mp4", None).value)
    pipe = DiffusionPipeline.from_pretrained(pipelines / "sd")
    with torch.no_grad():
        frames = pipe.vae.encode(clip.transpose(0, 1)).latent_dist.mean
    assert found.shape == (4, 5, 8, 8)
    torch.testing.assert_close(found, (frames.transpose(0, 1) - 0.25) * 0.5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [TextToVideoSDPipeline, AnimateDiffPipeline])
def test_text_to_video_pipelines_give_one_embedding_a_clip(
    tmp_path: Path, videos: Path, kind: Any
) -> None:
    folder = save_text_to_video(tmp_path / "pipeline", kind)
    options = ("--frames", "5", "--size", "16")
    found = read(encode(videos, folder, tmp_path / "dest", *options))["0"]
    pipe = kind.from_pretrained(folder)
    with torch.no_grad():
        text, _ = pipe.encode_prompt(found["txt"].decode(), "cpu", 1, False)
    assert latent(found).shape == (4, 5, 8, 8)
    torch.testing.assert_close(
        conditions(found), {"encoder_hidden_states": text[0]}, atol=1e-5, rtol=1e-4
    )


def test_wan_encodes_clips_and_text(tmp_path: Path, pipelines: Path, videos: Path) -> None:
    options = ("--frames", "5", "--size", "16", "--latents", "mean")
    found = read(encode(videos, pipelines / "wan", tmp_path, *options))["0"]
    clips = Videos(5, 16)
    clip = clips.finish(clips.decode(_part(videos, "0", "mp4"), "mp4", None).value)
    pipe = WanPipeline.from_pretrained(pipelines / "wan", transformer=None)
    with torch.no_grad():
        mean = pipe.vae.encode(clip[None]).latent_dist.mean[0]
        text, _ = pipe.encode_prompt(
            found["txt"].decode(), do_classifier_free_guidance=False, max_sequence_length=512
        )
    shift = torch.tensor(pipe.vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(-1, 1, 1, 1)
    assert mean.shape == (4, 2, 2, 2)
    torch.testing.assert_close(latent(found), (mean - shift) / std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        conditions(found), {"encoder_hidden_states": text[0]}, atol=1e-5, rtol=1e-4
    )


def test_a_video_vae_takes_an_image_for_a_clip_of_one_frame(
    tmp_path: Path, pipelines: Path, images: Path
) -> None:
    dest = encode(images, pipelines / "wan", tmp_path, "--size", "16", "--no-text")
    parts = read(dest)["0-0"]
    assert latent(parts).shape == (4, 1, 2, 2)
    assert "text.safetensors" not in parts


def test_a_vae_without_a_distribution_has_no_moments(
    tmp_path: Path, pipelines: Path, images: Path
) -> None:
    found = latent(read(encode(images, pipelines / "tiny", tmp_path / "a"))["0-0"])
    pipe = DiffusionPipeline.from_pretrained(pipelines / "tiny")
    with torch.no_grad():
        expected = pipe.vae.encode(pixels(images, "0-0", (16, 16))).latents[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(FewstepError, match="use --latents mean"):
        encode(images, pipelines / "tiny", tmp_path / "b", "--latents", "moments")


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_two_array_tasks_together_are_one_run(
    tmp_path: Path, pipelines: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tars(encode(images, pipelines / "sd", tmp_path / "one"))
    dest = tmp_path / "two"
    for task in ("4", "6"):  # sbatch --array=4-6:2
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "4")
        monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        encode(images, pipelines / "sd", dest)
        assert len(tars(dest)) == (2 if task == "4" else 3)
    assert tars(dest) == one


def test_loading_processes_change_nothing(
    tmp_path: Path, pipelines: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "fork_server", lambda: get_context("fork"))
    alone = tars(encode(images, pipelines / "sd", tmp_path / "alone", "--batch-size", "2"))
    helped = encode(images, pipelines / "sd", tmp_path / "helped", "--batch-size", "2", workers=1)
    assert tars(helped) == alone


def test_a_stopped_run_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, pipelines: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tars(encode(images, pipelines / "sd", tmp_path / "whole", "--batch-size", "2"))
    dest, latents, calls = tmp_path / "stopped", Encoder.latents, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return latents(*arguments)

    monkeypatch.setattr(Encoder, "latents", interrupted)
    with pytest.raises(SystemExit):
        encode(images, pipelines / "sd", dest, "--batch-size", "2")
    assert len(tars(dest)) == 1
    (dest / f"part-1.tar{PARTIAL}0123").write_bytes(b"of a process that was killed")
    encode(images, pipelines / "sd", dest, "--batch-size", "2")
    assert calls == 5 + 6  # three batches a shard; the first shard is not encoded again
    assert tars(dest) == whole
    assert not list(dest.glob(f"*{PARTIAL}*"))


def test_other_settings_or_weights_are_refused_by_name(
    tmp_path: Path, pipelines: Path, images: Path
) -> None:
    dest = encode(images, pipelines / "sd", tmp_path)
    with pytest.raises(FewstepError, match=r"size was \[16, 16\] and is now \[32, 32\]"):
        encode(images, pipelines / "sd", dest, "--size", "32")
    with pytest.raises(FewstepError, match="weights was"):
        encode(images, pipelines / "tiny", dest)


def test_too_many_damaged_records_stop_it(
    tmp_path: Path, pipelines: Path, images: Path, capsys: Any
) -> None:
    encode(images, pipelines / "sd", tmp_path / "a")
    assert "Left out: part-2.tar/2-3: " in capsys.readouterr().out
    with pytest.raises(FewstepError, match=r"1 damaged records .*part-2\.tar/2-3"):
        encode(images, pipelines / "sd", tmp_path / "b", "--max-damaged", "0")


def test_sizes_and_lengths_the_vae_cannot_encode_are_refused(
    tmp_path: Path, pipelines: Path, images: Path, videos: Path
) -> None:
    with pytest.raises(FewstepError, match="multiples of 2"):
        encode(images, pipelines / "sd", tmp_path / "a", "--size", "15")
    with pytest.raises(FewstepError, match=r"1 \+ 4 n frames; use --frames 1 or 5"):
        encode(videos, pipelines / "wan", tmp_path / "b", "--size", "16", "--frames", "4")


def test_unsupported_pipelines_are_answered_with_the_supported(
    tmp_path: Path, images: Path
) -> None:
    folder = tmp_path / "kandinsky"
    folder.mkdir()
    with pytest.raises(FewstepError, match=r"needs a model_index\.json"):
        encode(images, folder, tmp_path / "dest")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(FewstepError, match=r"KandinskyPipeline; supported are StableDiffusionPip"):
        encode(images, folder, tmp_path / "dest")


def test_the_part_of_the_work() -> None:
    assert part_of_work(None, None, {}) == (0, 1)
    assert part_of_work(2, 3, {"SLURM_ARRAY_TASK_ID": "0"}) == (2, 3)
    with pytest.raises(FewstepError, match="give both or neither"):
        part_of_work(1, None, {})
    with pytest.raises(FewstepError, match="not one of the numbers 0 to 2"):
        part_of_work(3, 3, {})


def test_half_precision_that_overflows_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(FewstepError, match="--dtype bf16"):
        encoding.packed({"latent": torch.full((1, 2), 1e6)}, 0, torch.float16, "a")
