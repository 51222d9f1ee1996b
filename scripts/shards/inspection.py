"""Decodes all of a shard and notes what is in it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from datamodules.fields import Caption, ClassLabel, Images, Latents
from datamodules.fields.images import EXTENSIONS, FORMATS
from datamodules.fields.tensors import read_npy, read_safetensors
from datamodules.index import Record, ShardIndex, scan
from datamodules.sources import Sources
from datamodules.video_files import Timeline, decoded_frames, open_video, pyav, video_stream
from fewstep.errors import FewstepError
from scripts.shards.moments import Moments
from scripts.shards.tars import index_path, whole

VIDEOS = ("mp4", "webm", "mkv", "mov")
LATENTS = Latents().keys
DIGEST_BYTES = 16
MAX_PIXELS = 4096 * 2304  # the limits of the Videos field
MAX_FRAMES = 36_000
THUMBNAIL = 256  # longest side in pixels


@dataclass(frozen=True)
class Task:
    """What to do with a shard.

    Attributes:
        shard: its address.
        pictures: how many of its records to keep a thumbnail of.
    """

    shard: str
    pictures: int = 0


@dataclass(frozen=True)
class Picture:
    """A record on the contact sheet: its thumbnail as a PNG, and what stands below."""

    png: bytes
    caption: str


@dataclass
class Findings:
    """What is in a shard.

    Attributes:
        shard: its address.
        fault: why the shard as a whole is of no use; None if it is.
        records, size: their number, and the shard's bytes.
        parts: in how many records each extension occurs.
        corrupt: key and reason of each record that cannot be decoded.
        keys, contents: 16-byte digests, one a record, of its key and of its media; all zero where
            it has no media.
        images, videos: how often each (height, width) occurs.
        frames, fps, seconds: of videos; fps are rounded to hundredths, seconds to tenths.
        captions: how often each number of characters occurs.
        classes: how often each class label occurs.
        latents: statistics of values by extension and number of channels.
        pictures: for the contact sheet.
    """

    shard: str
    fault: str | None = None
    records: int = 0
    size: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    keys: bytearray = field(default_factory=bytearray)
    contents: bytearray = field(default_factory=bytearray)
    images: Counter[tuple[int, int]] = field(default_factory=Counter)
    videos: Counter[tuple[int, int]] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    fps: Counter[float] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    latents: dict[tuple[str, int], Moments] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)


def inspect_shard(task: Task, sources: Sources) -> Findings:
    """Decodes every part of every record of a shard."""
    found = Findings(task.shard)
    try:
        path = sources.local(task.shard)
        index = scan(path)
    except FewstepError as error:
        found.fault = str(error)
        return found
    if sources.is_local(task.shard) and index_path(path).exists() and not whole(path):
        found.fault = f"its index is of another shard; run: fewstep shards index --force {path}"
    found.records, found.size = len(index), index.tar_bytes
    every = max(1, len(index) // task.pictures) if task.pictures else 0
    with path.open("rb") as file:
        for number in range(len(index)):
            parts = _read(index, number, task.shard, file)
            wanted = every and number % every == 0 and len(found.pictures) < task.pictures
            _Inspector(found, index.keys[number], parts).run(bool(wanted))
    return found


def _read(index: ShardIndex, number: int, shard: str, file: Any) -> dict[str, bytes]:
    record: Record = index.record(number, shard)
    parts = {}
    for extension, (offset, size) in record.parts.items():
        file.seek(offset)
        parts[extension] = file.read(size)
    return parts


class _Inspector:
    """Decodes one record; what it finds is noted only if all of the record is sound."""

    def __init__(self, found: Findings, key: str, parts: dict[str, bytes]) -> None:
        self.found, self.key, self.parts = found, key, parts
        self.notes: list[Callable[[], None]] = []
        self.picture: Image.Image | None = None
        self.caption: str | None = None

    def run(self, wants_picture: bool) -> None:
        self.found.keys += _digest(self.key.encode())
        self.found.contents += self._content()
        self.found.parts.update(self.parts.keys())
        try:
            for extension, data in self.parts.items():
                self._part(extension, data, wants_picture)
        except FewstepError:
            raise  # about this machine, not about the record
        except Exception as error:
            reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
            self.found.corrupt.append((self.key, f"{extension}: {reason}"))
            return
        for note in self.notes:
            note()
        if self.caption is not None:
            self.found.captions[len(self.caption)] += 1
        if self.picture is not None:
            self.found.pictures.append(Picture(_thumbnail(self.picture), self._below()))

    def _content(self) -> bytes:
        media = [e for e in sorted(self.parts) if _kind(e) in (*EXTENSIONS, *VIDEOS)]
        media = media or [e for e in sorted(self.parts) if e in LATENTS]
        if not media:
            return bytes(DIGEST_BYTES)
        return _digest(*(self.parts[extension] for extension in media))

    def _below(self) -> str:
        label = self.parts.get("cls", b"").decode().strip()
        return " ".join(text for text in (label and f"[{label}]", self.caption or self.key) if text)

    def _part(self, extension: str, data: bytes, wants_picture: bool) -> None:
        kind = _kind(extension)
        if kind in EXTENSIONS:
            self._image(data, kind, wants_picture)
        elif kind in VIDEOS:
            self._video(data, wants_picture)
        elif kind == "cls":
            label = ClassLabel().decode(data, kind, None).value
            self.notes.append(lambda: self.found.classes.update([label]))
        elif kind == "txt":
            self.caption = Caption().decode(data, kind, None).value
        elif kind == "json":
            self._json(data)
        elif kind in ("npy", "safetensors"):
            self._tensors(extension, data)

    def _image(self, data: bytes, kind: str, wants_picture: bool) -> None:
        value = Images().decode(data, kind, None).value
        shape = (int(value.shape[1]), int(value.shape[2]))
        self.notes.append(lambda: self.found.images.update([shape]))
        if wants_picture:
            self.picture = Image.open(io.BytesIO(data), formats=FORMATS)

    def _video(self, data: bytes, wants_picture: bool) -> None:
        av = pyav()
        try:
            with open_video(data, MAX_PIXELS) as container:
                stream = video_stream(container)
                timeline = Timeline.read(container, stream, MAX_FRAMES)
                middle = int(timeline.pts[len(timeline.pts) // 2])
                seen: set[int] = set()
                for frame in decoded_frames(stream, timeline.packets):
                    if frame.pts is not None and not frame.is_corrupt:
                        seen.add(frame.pts)
                    if wants_picture and frame.pts == middle:
                        self.picture = frame.to_image()
                shape = (stream.height, stream.width)
        except av.FFmpegError as error:
            raise ValueError(f"the video cannot be read: {error.strerror}") from error
        count = len(timeline.pts)
        lost = count - len(seen.intersection(timeline.pts.tolist()))
        if lost:
            raise ValueError(f"truncated or damaged: {lost} of {count} frames cannot be decoded")
        self.notes.append(lambda: self._note_video(shape, count, timeline.end))

    def _note_video(self, shape: tuple[int, int], count: int, seconds: float) -> None:
        self.found.videos[shape] += 1
        self.found.frames[count] += 1
        self.found.seconds[round(seconds, 1)] += 1
        if seconds:
            self.found.fps[round(count / seconds, 2)] += 1

    def _json(self, data: bytes) -> None:
        facts = json.loads(data)
        caption = facts.get("caption") if isinstance(facts, dict) else None
        if isinstance(caption, str) and "txt" not in self.parts:
            self.caption = caption.strip()

    def _tensors(self, extension: str, data: bytes) -> None:
        if extension.endswith("npy"):
            arrays: dict[str, Any] = {"latent": read_npy(data)}
        else:
            arrays = {name: value.float().numpy() for name, value in read_safetensors(data).items()}
        for name, values in arrays.items():
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                raise ValueError(f"'{name}' holds numbers that are not finite")
        mean = arrays.get("latent", arrays.get("mean"))
        if extension in LATENTS and mean is not None and mean.ndim in (3, 4):
            self.notes.append(lambda: self._note_latent(extension, mean, arrays.get("std")))

    def _note_latent(self, extension: str, mean: Any, std: Any) -> None:
        place = (extension, len(mean))
        self.found.latents[place] = self.found.latents.get(place, Moments()) + Moments.of(mean, std)


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _digest(*contents: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for content in contents:
        digest.update(content)
    return digest.digest()


def _thumbnail(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
