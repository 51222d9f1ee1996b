"""Bouncing digits: their motion is what the metadata says, and each kind looks as it should."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.index import ShardIndex
from datamodules.moving_clips import (
    Kind,
    Scene,
    _digits,
    encode_mp4,
    moving_clip,
    moving_digits_record,
    watermark,
    write_moving_digits,
)
from fewstep.errors import FewstepError

av = pytest.importorskip("av")

Pixels = np.ndarray[Any, Any]


def decoded(data: bytes) -> Pixels:
    """Grey values of every frame, ``(F, H, W)``."""
    with av.open(io.BytesIO(data)) as source:
        return np.stack([f.to_ndarray(format="rgb24")[..., 0] for f in source.decode(video=0)])


def sharpness(frames: Pixels) -> float:
    """Mean square of the Laplacian relative to the variance."""
    frames = frames.astype(float)
    inner = frames[..., 1:-1, 1:-1]
    around = frames[..., :-2, 1:-1] + frames[..., 2:, 1:-1]
    around = around + frames[..., 1:-1, :-2] + frames[..., 1:-1, 2:]
    return float(((around - 4 * inner) ** 2).mean() / frames.var())


def centroid(frame: Pixels) -> Pixels:
    row, column = np.mgrid[: frame.shape[0], : frame.shape[1]]
    return np.array([(frame * column).sum(), (frame * row).sum()]) / frame.sum()


def checksums(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))
    }


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


# ------------------------------------------------------------------ clips


def test_a_clip_is_a_pure_function_of_seed_and_number() -> None:
    first, again = moving_clip(3, seed=5), moving_clip(3, seed=5)
    assert np.array_equal(first.frames, again.frames)
    assert first.frames.shape == (16, 32, 32)
    assert first.frames.dtype == np.uint8
    others = [moving_clip(4, seed=5), moving_clip(3, seed=6), moving_clip(3, 5, split="val")]
    assert not any(np.isin(other.velocities, first.velocities).any() for other in others)


def test_the_track_is_where_the_digit_is_in_the_decoded_video() -> None:
    scene = Scene(num_frames=24, max_digits=1)
    turned = 0
    for number in range(12):
        clip = moving_clip(number, 0, scene=scene)
        frames = decoded(encode_mp4(clip.frames, scene.fps)).astype(float)
        measured = np.stack([centroid(np.where(frame > 20, frame, 0)) for frame in frames])
        assert np.abs(measured - clip.centres[0]).max() < 0.5
        turned += bool((np.diff(np.sign(np.diff(clip.centres[0], axis=0)), axis=0) != 0).any())
    assert turned > 6  # most of them met a wall


def test_between_walls_the_velocity_is_constant() -> None:
    seen = 0
    for number in range(20):
        clip = moving_clip(number, 0)
        assert clip.velocities.shape == (len(clip.classes), 2)
        speed = np.hypot(*clip.velocities.T)
        assert ((speed >= 0.5) & (speed <= 2)).all()
        steps = np.diff(clip.centres, axis=1)
        along = np.isclose(np.abs(steps), np.abs(clip.velocities)[:, None], atol=1e-9)
        seen += along.sum()
        assert (np.abs(steps) <= np.abs(clip.velocities)[:, None] + 1e-9).all()
        assert along.mean() > 0.7
    assert seen


def test_clips_hold_one_or_two_digits_of_every_class() -> None:
    clips = [moving_clip(number, 0, scene=Scene(num_frames=1)) for number in range(200)]
    assert {len(clip.classes) for clip in clips} == {1, 2}
    assert {c for clip in clips for c in clip.classes} == set(range(10))


def test_no_handwritten_digit_is_in_both_splits() -> None:
    (train, _), (val, _) = _digits("train"), _digits("val")
    assert (len(train), len(val)) == (1617, 180)
    seen = {digit.tobytes() for digit in train}
    assert not any(digit.tobytes() in seen for digit in val)


# ------------------------------------------------------------------ kinds


def mean_frame(kind: Kind) -> Pixels:
    clips = [moving_clip(number, 0, kind).frames for number in range(40)]
    return np.mean(clips, axis=(0, 1))


def test_the_watermark_stands_still_and_only_where_it_belongs() -> None:
    opacity = watermark(32)
    assert 0.05 < (opacity > 0).mean() < 0.2
    marked = np.stack([moving_clip(number, 0, "watermarked").frames for number in range(20)])
    assert (marked >= np.floor(255 * opacity) - 1).all()  # white over anything
    unmarked = moving_clip(0, 0, "watermarked").frames[:, opacity == 0]
    assert (unmarked == 0).any()

    def energy(kind: Kind) -> float:
        """How much of the mark's pattern the average frame holds."""
        pattern = np.where(opacity > 0, opacity - opacity[opacity > 0].mean(), 0)
        return float((mean_frame(kind) * pattern).sum() / (255 * (pattern**2).sum()))

    assert energy("watermarked") > 0.8
    assert abs(energy("clear")) < 0.15
    assert abs(energy("crisp")) < 0.15


def test_watermarked_clips_move_as_the_clear_ones_and_crisp_ones_do_not() -> None:
    clear, marked = moving_clip(7, 1, "clear"), moving_clip(7, 1, "watermarked")
    assert np.array_equal(clear.centres, marked.centres)
    assert not np.array_equal(clear.frames, marked.frames)
    assert moving_clip(7, 1, "crisp").velocities.tolist() != clear.velocities.tolist()


def test_crisp_images_are_sharper_than_watermarked_videos() -> None:
    crisp, marked = [], []
    for number in range(20):
        image = moving_digits_record(number, 0, "crisp", "train", Scene())["png"]
        film = moving_digits_record(number, 0, "watermarked", "train", Scene())["mp4"]
        crisp.append(sharpness(np.array(Image.open(io.BytesIO(image)))))
        marked.append(sharpness(decoded(film)))
    assert np.mean(crisp) > 2 * np.mean(marked)


# ------------------------------------------------------------------ files


def test_encoding_is_nearly_lossless_and_repeatable() -> None:
    clip = moving_clip(0, 0)
    data = encode_mp4(clip.frames, 8)
    assert data == encode_mp4(clip.frames, 8)
    assert b" threads=1 " in encode_mp4(np.zeros((2, 256, 256), np.uint8), 8)  # on any machine
    error = np.abs(decoded(data).astype(float) - clip.frames)
    assert error.mean() < 1
    with av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        assert (stream.average_rate, stream.frames) == (8, 16)
        keyframes = [p.pts for p in source.demux(stream) if p.is_keyframe and p.size]
    assert len(keyframes) >= 2


@pytest.mark.parametrize("kind", ["watermarked", "crisp"])
def test_shards_hold_what_a_method_needs(kind: Kind, tmp_path: Path) -> None:
    write_moving_digits(tmp_path / "set", kind, num_clips=5, num_held_out=2, clips_per_shard=3)
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    shards = ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert names == sorted([*shards, *(f"{name}.index" for name in shards)])
    part = "png" if kind == "crisp" else "mp4"
    index = ShardIndex.load(tmp_path / "set" / "train-000000.tar.index")
    assert index.keys == ["000000", "000001", "000002"]
    assert set(index.extensions) == {part, "txt", "cls", "json"}
    record = members(tmp_path / "set" / "train-000001.tar")
    facts, clip = json.loads(record["000003.json"]), moving_clip(3, 0, kind)
    assert int(record["000003.cls"]) == clip.classes[0] == facts["classes"][0]
    caption = clip.caption + ("" if kind == "crisp" else " moving")
    assert record["000003.txt"].decode() == caption
    assert facts["fps"] == 8
    frames = 1 if kind == "crisp" else 16
    assert np.array(facts["centres"]).shape == (len(clip.classes), frames, 2)
    if kind == "crisp":
        image = np.array(Image.open(io.BytesIO(record["000003.png"])))
        moment = [np.array_equal(image, frame) for frame in clip.frames].index(True)
        assert np.allclose(facts["centres"], clip.centres[:, moment : moment + 1], atol=1e-4)


def test_captions_are_english() -> None:
    captions = {moving_clip(n, 0, scene=Scene(num_frames=1)).caption for n in range(200)}
    assert "an 8" in captions
    assert "a 7" in captions
    assert any(" and an 8" in caption for caption in captions)
    assert not any("a 8" in caption.split(" and ") for caption in captions)


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    for workers in (0, 2):
        write_moving_digits(tmp_path / f"{workers}", "clear", 20, 3, seed=1, workers=workers)
    assert checksums(tmp_path / "0") == checksums(tmp_path / "2")
    write_moving_digits(tmp_path / "other", "clear", 20, 3, seed=2)
    assert checksums(tmp_path / "other") != checksums(tmp_path / "0")


def test_a_failure_leaves_the_old_set_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_moving_digits(tmp_path / "set", "crisp", 4, 2)
    before = checksums(tmp_path / "set")
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_moving_digits(tmp_path / "set", "crisp", 4, 2, seed=9)
    assert checksums(tmp_path / "set") == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_may_have_no_held_out_clips(tmp_path: Path) -> None:
    write_moving_digits(tmp_path / "set", "crisp", 2, 0)
    assert [path.name for path in (tmp_path / "set").glob("*.tar")] == ["train-000000.tar"]


@pytest.mark.parametrize("options", [{"size": 33}, {"size": 8}, {"num_frames": 0}])
def test_impossible_scenes_are_explained(options: dict[str, int]) -> None:
    with pytest.raises(FewstepError, match="scene"):
        Scene(**options)
