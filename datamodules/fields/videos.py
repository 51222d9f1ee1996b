"""Clips of video files, of which only the wanted frames are decoded and converted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamodules.fields.base import Decoded, Field, Random
from datamodules.video_files import Timeline, decoded_frames, open_video, pyav, video_stream
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from av.video import VideoFrame, VideoStream
    from av.video.reformatter import VideoReformatter

CLOCK_ROUNDING = 0.51e-3  # seconds: Matroska stores times in whole milliseconds


class Videos(Field):
    """Clips ``(C, F, H, W)`` of mp4, mov, webm and mkv files.

    The frames' times are read first, without decoding, so variable frame rates, reordered frames
    and files without a duration or a frame count are all the same to it. Then decoding runs from
    the last keyframe before the clip to the clip's last frame. The file's packets are in memory
    twice meanwhile; decoded frames are kept only at their final size.

    Frames are resized to cover ``size`` and cropped at the centre. Rotations by quarter turns that
    cameras note are applied; their mirrorings and pixels that are not square are not.

    Args:
        frames: frames of a clip.
        size: height and width of the result, or one number for both.
        fps: frames a second to take: at each wanted time the frame a player would show. Excludes
            ``stride``.
        stride: take every n-th frame of the file instead; 1 if neither is given.
        clip: where in the file. Evaluation takes ``middle`` for ``random``.
        short: what to do with files shorter than a clip: skip them, repeat the last frame, or play
            them to and fro.
        flip: mirror half of the clips left to right in training.
        channels: 3 (RGB) or 1 (grey).
        keys: extensions of the part.
        max_seconds, max_frames, max_pixels: longer files, and frames with more pixels, are refused
            before anything is decoded.

    Raises:
        FewstepError: if options contradict each other or PyAV is not installed.
    """

    def __init__(
        self,
        frames: int,
        size: int | tuple[int, int],
        fps: float | None = None,
        stride: int | None = None,
        clip: Literal["random", "start", "middle"] = "random",
        short: Literal["skip", "repeat", "pingpong"] = "skip",
        flip: bool = False,
        channels: int = 3,
        keys: Sequence[str] = ("mp4", "webm", "mkv", "mov"),
        max_seconds: float = 600,
        max_frames: int = 36_000,
        max_pixels: int = 4096 * 2304,
    ) -> None:
        super().__init__(keys)
        if fps is not None and stride is not None:
            raise FewstepError("Videos takes fps or stride, not both; remove one of them.")
        height, width = (size, size) if isinstance(size, int) else size
        if min(frames, height, width, fps or 1, 1 if stride is None else stride) <= 0 or fps == 0:
            raise FewstepError("Videos needs frames, size, fps and stride greater than 0.")
        if channels not in (1, 3):
            raise FewstepError(f"Videos has channels: 1 (grey) or 3 (RGB), not {channels}.")
        pyav()
        self.frames, self.height, self.width = frames, height, width
        self.fps, self.stride = fps, stride or 1
        self.clip, self.short, self.flip, self.channels = clip, short, flip, channels
        self.max_seconds, self.max_frames, self.max_pixels = max_seconds, max_frames, max_pixels

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        av = pyav()
        draws = self.clip == "random" or self.flip
        rng = random() if random is not None and draws else None
        try:
            with open_video(data, self.max_pixels) as container:
                stream = video_stream(container)
                self._check_size(stream.width, stream.height)
                timeline = Timeline.read(container, stream, self.max_frames)
                self._check_length(timeline)
                numbers, available = self._choose(timeline, rng)
                pixels = self._pixels(stream, timeline, numbers)
        except av.FFmpegError as error:
            raise ValueError(f"the video cannot be read: {error.strerror}") from error
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        value = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)))
        short = f"short clip: {available} of {self.frames} frames"
        return Decoded(value, short if available < self.frames else None)

    def finish(self, values: Tensor) -> Tensor:
        """Pixels in [-1, 1]."""
        return values.float() / 127.5 - 1

    def _check_size(self, width: int, height: int) -> None:
        if not width * height:  # FFmpeg gave up when it looked into the stream
            raise ValueError(f"no size is known, or more pixels than max_pixels: {self.max_pixels}")
        if width * height > self.max_pixels:
            raise ValueError(f"{width} x {height} pixels, more than max_pixels: {self.max_pixels}")

    def _check_length(self, timeline: Timeline) -> None:
        if timeline.end > self.max_seconds:
            raise ValueError(f"{timeline.end:.0f} s, more than max_seconds: {self.max_seconds}")

    def _choose(
        self, timeline: Timeline, rng: np.random.Generator | None
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Numbers of the wanted frames, ``(frames,)``, and how many of them the file can fill."""
        if self.fps is None:  # the same sums, with frame numbers in place of seconds
            times: npt.NDArray[np.float64] = np.arange(len(timeline.pts), dtype=np.float64)
            end, step, rounding = float(len(times)), float(self.stride), 0.0
        else:
            times, end, step, rounding = timeline.times, timeline.end, 1 / self.fps, CLOCK_ROUNDING
        available = min(self.frames, max(1, math.ceil((end - rounding) / step)))
        start, slack = 0.0, end - (self.frames - 1) * step
        if available < self.frames:
            if self.short == "skip":
                raise ValueError(f"short clip: {available} of {self.frames} frames")
        elif self.clip == "random" and rng is not None:
            start = rng.random() * slack
        elif self.clip != "start":
            start = slack / 2
        wanted = start + step * _lengthened(available, self.frames, self.short) + rounding
        numbers = np.searchsorted(times, wanted, side="right") - 1
        return np.clip(numbers, 0, len(times) - 1), available

    def _pixels(
        self, stream: VideoStream, timeline: Timeline, numbers: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """The frames of these numbers, ``(F, H, W, C)``."""
        from av.video.reformatter import VideoReformatter  # noqa: PLC0415

        wanted = sorted({int(timeline.pts[number]) for number in numbers})
        scaler = VideoReformatter()
        found: dict[int, npt.NDArray[np.uint8]] = {}
        # The second try is for streams that need frames from before their keyframe, as with x264's
        # intra-refresh.
        for start in dict.fromkeys((timeline.keyframe(wanted[0]), 0)):
            for frame in decoded_frames(stream, timeline.packets[start:]):
                if frame.is_corrupt:
                    break  # FFmpeg has painted over damage, and later frames build on it
                if frame.pts in wanted:
                    found[frame.pts] = self._convert(frame, scaler)
                if frame.pts is not None and frame.pts >= wanted[-1]:
                    break
            if len(found) == len(wanted):
                return np.stack([found[int(timeline.pts[number])] for number in numbers])
        raise ValueError(
            f"truncated or damaged: {len(found)} of {len(wanted)} wanted frames could be decoded"
        )

    def _convert(self, frame: VideoFrame, scaler: VideoReformatter) -> npt.NDArray[np.uint8]:
        """Covers and crops to ``(H, W, C)``."""
        self._check_size(frame.width, frame.height)
        turns = round(frame.rotation / 90) % 4  # anticlockwise
        height, width = (self.height, self.width)[:: -1 if turns % 2 else 1]
        scale = max(height / frame.height, width / frame.width)
        rows = max(height, round(frame.height * scale))
        columns = max(width, round(frame.width * scale))
        self._check_size(columns, rows)  # a long thin frame would grow without bound
        scaled = scaler.reformat(
            frame, columns, rows, "rgb24", interpolation="BICUBIC", threads=1
        ).to_ndarray()
        top, left = (rows - height) // 2, (columns - width) // 2
        pixels = np.rot90(scaled[top : top + height, left : left + width], turns)
        if self.channels == 1:
            pixels = np.round(pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
        return pixels.astype(np.uint8)


def _lengthened(available: int, frames: int, short: str) -> npt.NDArray[np.int64]:
    """Which of the available frames fill a clip, ``(frames,)``."""
    numbers = np.arange(frames)
    if short == "pingpong" and available > 1:
        folded = numbers % (2 * (available - 1))
        return np.minimum(folded, 2 * (available - 1) - folded)
    return np.minimum(numbers, available - 1)
