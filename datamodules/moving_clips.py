"""Clips of real handwritten digits that bounce in a square: a video data set with no download.

Three kinds, for methods that learn motion from one set and appearance from another. ``clear``
videos; ``watermarked`` videos, the same clips blurred and with a mark that stands still; and
``crisp`` images, single frames of other clips with neither. Every clip is a pure function of its
seed and number, and the train and val splits hold different handwritten digits.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

from datamodules.digits import NUM_HELD_OUT, SPLIT_SEED
from datamodules.index import SUFFIX, scan
from datamodules.video_files import pyav
from fewstep.errors import FewstepError
from fewstep.watermark import watermark

Kind = Literal["clear", "watermarked", "crisp"]
Split = Literal["train", "val"]
Floats = npt.NDArray[np.float64]

CRF = 10  # x264's quality: the mean error is under one of the 255 grey levels
KEYFRAME_EVERY = 8


@dataclass(frozen=True)
class Scene:
    """What all clips of a set share.

    Args:
        num_frames: frames of a clip.
        size: side in pixels, an even number of at least 16.
        fps: frames a second that the files state.
        max_digits: a clip has one digit to this many.
        blur: standard deviation, in pixels, of the blur of ``watermarked`` clips.
    """

    num_frames: int = 16
    size: int = 32
    fps: int = 8
    max_digits: int = 2
    blur: float = 1.0

    def __post_init__(self) -> None:
        if min(self.num_frames, self.fps, self.max_digits) < 1:
            raise FewstepError("A scene needs num_frames, fps and max_digits of at least 1.")
        if self.blur <= 0:
            raise FewstepError(f"A scene's blur must be positive, not {self.blur}.")
        if self.size < 16 or self.size % 2:
            raise FewstepError(f"A scene's size must be even and at least 16, not {self.size}.")

    @property
    def digit_size(self) -> int:
        """Side of the square that a digit fills, in pixels."""
        return self.size // 2


@dataclass(frozen=True)
class Clip:
    """A clip and what is known about it.

    Attributes:
        frames: ``(F, H, W)`` uint8, light digits on black.
        classes: ``n`` digits.
        velocities: ``(n, 2)`` x and y in pixels a frame at the first frame.
        centres: ``(n, F, 2)`` x and y of the centre of each digit's ink, in pixels; the centre of
            the top left pixel is (0, 0).
    """

    frames: npt.NDArray[np.uint8]
    classes: tuple[int, ...]
    velocities: Floats
    centres: Floats

    @property
    def caption(self) -> str:
        """Such as "a 3 and an 8"."""
        return " and ".join(f"{'an' if c == 8 else 'a'} {c}" for c in self.classes)


def moving_clip(
    number: int, seed: int, kind: Kind = "clear", split: Split = "train", scene: Scene | None = None
) -> Clip:
    """Draws a clip, a pure function of its arguments.

    The clear and the watermarked clip of one number show the same motion; crisp clips others.
    """
    scene = scene or Scene()
    rng = np.random.default_rng((seed, number, split == "val", kind == "crisp"))
    images, labels = _digits(split)
    count = int(rng.integers(1, scene.max_digits + 1))
    chosen = rng.integers(len(labels), size=count)
    angles, speeds = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.5, 2.0, count)
    velocities = speeds[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    room = scene.size - scene.digit_size
    starts = rng.uniform(0, room, (count, 2))
    elapsed = np.arange(scene.num_frames)[:, None]
    corners = _bounced(starts[:, None] + elapsed * velocities[:, None], room)
    frames = np.zeros((scene.num_frames, scene.size, scene.size))
    for digit, track in zip(images[chosen], corners, strict=True):
        drawn = np.stack([_placed(digit, corner, scene) for corner in track])
        frames = np.maximum(frames, drawn)
    if kind == "watermarked":
        opacity = watermark(scene.size)
        frames = _blurred(frames, scene.blur) * (1 - opacity) + opacity
    return Clip(
        frames=np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8),
        classes=tuple(int(label) for label in labels[chosen]),
        velocities=velocities,
        centres=corners + _ink_centres(images[chosen], scene)[:, None],
    )


def encode_mp4(frames: npt.NDArray[np.uint8], fps: int) -> bytes:
    """Encodes grey frames ``(F, H, W)`` with even sides; the same frames give the same bytes.

    The format is yuv420p: what it saves is colour, of which there is none here, and unlike yuv444p
    every player and hardware decoder knows it.
    """
    av = pyav()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        # In plain C: x264's AVX-512 code also reads what happens to lie beside small frames, and
        # bytes differ from call to call. At these sizes it costs milliseconds a clip.
        plain = {"x264-params": "asm=0"}
        stream.options = {"crf": str(CRF), "g": str(KEYFRAME_EVERY), **plain}
        stream.codec_context.thread_count = 1  # x264 writes the number into the file
        for frame in frames:
            rgb = np.repeat(frame[..., None], 3, axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def moving_digits_record(
    number: int, seed: int, kind: Kind, split: Split, scene: Scene
) -> dict[str, Any]:
    """One WebDataset record: ``mp4`` or ``png``, and ``txt``, ``cls`` and ``json``."""
    clip = moving_clip(number, seed, kind, split, scene)
    record: dict[str, Any] = {
        "__key__": f"{number:06d}",
        "txt": clip.caption if kind == "crisp" else f"{clip.caption} moving",
        "cls": str(clip.classes[0]).encode(),
    }
    centres = clip.centres
    if kind == "crisp":
        moment = int(
            np.random.default_rng((seed, number, split == "val", 2)).integers(scene.num_frames)
        )
        centres = centres[:, moment : moment + 1]
        encoded = io.BytesIO()
        Image.fromarray(clip.frames[moment]).save(encoded, format="PNG")
        record["png"] = encoded.getvalue()
    else:
        record["mp4"] = encode_mp4(clip.frames, scene.fps)
    facts = {
        "fps": scene.fps,
        "classes": clip.classes,
        "velocities": clip.velocities.round(4).tolist(),
        "centres": centres.round(4).tolist(),
    }
    return {**record, "json": json.dumps(facts).encode()}


def write_moving_digits(
    folder: Path,
    kind: Kind,
    num_clips: int,
    num_held_out: int,
    seed: int = 0,
    workers: int = 0,
    scene: Scene | None = None,
    clips_per_shard: int = 256,
) -> None:
    """Writes ``train-*.tar`` and ``val-*.tar`` below ``folder`` with their indices, all or nothing.

    Args:
        folder: is replaced if it exists.
        kind: clear or watermarked videos, or crisp images.
        num_clips: training clips.
        num_held_out: clips of the val split.
        seed: of everything drawn.
        workers: processes that draw and encode, 0 for this one; the files are the same.
        scene: size, length and frame rate.
        clips_per_shard: records a shard.

    Raises:
        FewstepError: if PyAV, which encodes the videos, is not installed.
    """
    if kind != "crisp":
        pyav()
    partial_folder = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial_folder.mkdir(parents=True, exist_ok=True)
    try:
        splits: tuple[tuple[Split, int], ...] = (("train", num_clips), ("val", num_held_out))
        for split, count in splits:
            if not count:
                continue
            make = partial(
                moving_digits_record, seed=seed, kind=kind, split=split, scene=scene or Scene()
            )
            pattern = str(partial_folder / f"{split}-%06d.tar")
            # A fixed time in the headers, so that the same seed gives the same files.
            with wds.ShardWriter(pattern, maxcount=clips_per_shard, verbose=0, mtime=0) as writer:
                records = _in_order(make, count, workers)
                for record in tqdm(records, f"{kind} {split}", count, disable=None):
                    writer.write(record)
        for shard in sorted(partial_folder.glob("*.tar")):
            scan(shard).save(shard.with_name(shard.name + SUFFIX))
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.replace(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _in_order(make: partial[dict[str, Any]], count: int, workers: int) -> Iterator[dict[str, Any]]:
    if not workers:
        yield from map(make, range(count))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(make, range(count), chunksize=16)


@cache
def _digits(split: Split) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Grey values ``(n, 8, 8)`` from 0 to 1 and classes of a split."""
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    numbers = order[:NUM_HELD_OUT] if split == "val" else order[NUM_HELD_OUT:]
    return data.images[numbers] / 16, data.target[numbers]


def _bounced(positions: Floats, room: float) -> Floats:
    """Reflects straight lines at walls at 0 and ``room``."""
    folded = positions % (2 * room)
    return np.minimum(folded, 2 * room - folded)


def _placed(digit: Floats, corner: Floats, scene: Scene) -> Floats:
    """A digit with its upper left corner at x, y, between pixels where need be: ``(H, W)``."""
    across, down = (_interpolation(offset, scene) for offset in corner)
    return down @ np.pad(digit, 2) @ across.T


def _interpolation(offset: float, scene: Scene) -> Floats:
    """Keys' cubic weights of a digit's pixels, margin of 2, in a frame's, ``(size, 12)``."""
    pixel = (np.arange(scene.size) + 0.5 - offset) * 8 / scene.digit_size - 0.5
    distance = np.abs(pixel[:, None] + 2 - np.arange(12))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _ink_centres(digits: Floats, scene: Scene) -> Floats:
    """The centres of the digits' ink: x and y from their corners, ``(n, 2)``."""
    middles = (np.arange(8) + 0.5) * scene.digit_size / 8 - 0.5
    ink = digits.sum(axis=(1, 2))
    across, down = digits.sum(axis=1) @ middles, digits.sum(axis=2) @ middles
    return np.stack([across, down], axis=-1) / ink[:, None]


def _blurred(frames: Floats, deviation: float) -> Floats:
    """Gaussian blur within each frame, ``(F, H, W)``."""
    distance = np.subtract.outer(np.arange(frames.shape[-1]), np.arange(frames.shape[-1]))
    weights = np.exp(-0.5 * (distance / deviation) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ frames @ weights.T
