"""Opening video files that came from anywhere, and reading when their frames are shown."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video import VideoFrame, VideoStream

DECODERS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4", "mjpeg", "prores", "dnxhd")
"""FFmpeg's other decoders are old, rarely tested and no place for files from the web."""


EBML = b"\x1a\x45\xdf\xa3"
SEGMENT = b"\x18\x53\x80\x67"
# QuickTime files older than MP4 have no ftyp and begin with one of the others.
FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
PARENT_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")


@dataclass(frozen=True)
class Timeline:
    """When each frame of a file is shown.

    Attributes:
        packets: the encoded frames in the order of decoding.
        pts: ``(n,)`` the shown frames' times in ticks of the file's clock, ascending.
        times: ``(n,)`` the same in seconds from the first.
        end: seconds until the last frame vanishes.
    """

    packets: list[Packet[VideoStream]]
    pts: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    end: float

    @classmethod
    def read(cls, container: InputContainer, stream: VideoStream, max_frames: int) -> Timeline:
        """Reads the packets without decoding any.

        Raises:
            ValueError: if there are none, too many, or their times are unknown.
        """
        packets: list[Packet[VideoStream]] = []
        for packet in container.demux(stream):
            if packet.size:  # the last one is PyAV's own, empty
                packets.append(packet)
            if len(packets) > max_frames:
                raise ValueError(f"more frames than max_frames: {max_frames}")
        shown = {p.pts: p.duration or 0 for p in packets if p.pts is not None and _shown(p, stream)}
        if not shown or stream.time_base is None:
            raise ValueError("it holds no frames with times")
        pts = np.array(sorted(shown), dtype=np.int64)
        tick = float(stream.time_base)
        times = (pts - pts[0]) * tick
        last = shown[int(pts[-1])] * tick
        if not last and len(pts) > 1:
            last = float(np.median(np.diff(times)))
        return cls(packets, pts, times, float(times[-1]) + last)

    def keyframe(self, pts: int) -> int:
        """Number of the last packet from which the frame shown at ``pts`` can be decoded."""
        before = [
            number
            for number, packet in enumerate(self.packets)
            if packet.is_keyframe and packet.pts is not None and packet.pts <= pts
        ]
        return before[-1] if before else 0


def decoded_frames(
    stream: VideoStream, packets: Sequence[Packet[VideoStream]]
) -> Iterator[VideoFrame]:
    """Decodes packets, the first of which is a keyframe's, up to the first that is damaged."""
    import av  # noqa: PLC0415

    stream.codec_context.flush_buffers()
    with suppress(av.FFmpegError):  # later frames may be built on what is missing
        for packet in packets:
            yield from stream.codec_context.decode(packet)
    with suppress(av.FFmpegError):  # those that were waiting for their turn
        yield from stream.codec_context.decode(None)


def pyav() -> Any:
    """The PyAV library, which only videos need.

    Raises:
        FewstepError: if it is not installed.
    """
    try:
        import av  # noqa: PLC0415
    except ImportError as error:
        raise FewstepError("Videos need PyAV; install it: pip install 'fewstep[video]'.") from error
    return av


def open_video(data: bytes, max_pixels: int) -> InputContainer:
    """Opens a file as what its first bytes say.

    FFmpeg's own guess would accept playlists and lists of files, which name other files or
    addresses. External tracks of QuickTime files are off by FFmpeg's default (``enable_drefs``);
    here nothing but ``data`` can be opened whatever a demuxer asks for.
    """
    import av  # noqa: PLC0415

    if data[:4] == EBML:
        container, promised = "matroska", _segment_end(data)
    elif data[4:8] in FIRST_BOXES:
        container, promised = "mov", _boxes_end(data)
    else:
        raise ValueError("its content is no mp4, mov, webm or mkv")
    if promised > len(data):
        raise ValueError(f"truncated: {len(data)} of at least {promised} bytes are there")
    options = {
        # Frames may be larger than the headers say. FFmpeg rounds sides up before it compares.
        "max_pixels": str(4 * max_pixels),
        "codec_whitelist": ",".join(DECODERS),
        "enable_drefs": "0",
        "protocol_whitelist": "none",
    }
    return av.open(io.BytesIO(data), "r", format=container, options=options, io_open=_refuse)


def _refuse(url: str, *_: object) -> None:
    raise PermissionError(f"the video refers to another file: {url}")


def video_stream(container: InputContainer) -> VideoStream:
    """The first video, ready to be decoded in this thread.

    Raises:
        ValueError: if there is none, or it is in an unusual codec.
    """
    from av.stream import Disposition  # noqa: PLC0415

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a cover picture
            context = stream.codec_context
            if context is None or context.name not in DECODERS:
                raise ValueError(f"its codec is none of {', '.join(DECODERS)}")
            context.thread_count = 1  # data workers are the parallelism
            context.options = {"max_pixels": container.options["max_pixels"]}
            return stream
    raise ValueError("it has no video stream")


def _shown(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    """Whether a packet becomes a frame on the screen."""
    if packet.is_discard:  # cut away by an edit list
        return False
    # VP8 stores frames that are only referred to as packets of their own.
    return stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _boxes_end(data: bytes) -> int:
    """Where the last box of an mp4 ends by its own account.

    Raises:
        ValueError: if it claims more frames than it has bytes: FFmpeg would make room for them all.
    """
    position = end = 0
    while position + 8 <= len(data):
        size, name = (
            int.from_bytes(data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        body = position + 8
        if size == 1:
            size, body = int.from_bytes(data[body : body + 8]), body + 8
        if size < 8:  # 0: until the end of the file
            break
        end = max(end, position + size)
        first, second = (int.from_bytes(data[at : at + 4]) for at in (body + 4, body + 8))
        claimed = {b"stsz": max(first, 1) * second, b"trun": first}.get(name, 0)  # bytes at least
        if claimed > len(data):
            raise ValueError(f"damaged: frames of {claimed} bytes in a file of {len(data)}")
        # Only the header of a parent is passed over, so that its children come next.
        position = body if name in PARENT_BOXES else position + size
    return end


def _segment_end(data: bytes) -> int:
    """Where a Matroska file ends by its own account; 0 if it was streamed and does not say."""
    start = data.find(SEGMENT, 0, 4096) + len(SEGMENT)
    if start < len(SEGMENT) or start >= len(data):
        return 0
    length = 9 - data[start].bit_length()  # leading zeros give the bytes of the number
    size = int.from_bytes(data[start : start + length]) & ((1 << 7 * length) - 1)
    return 0 if size == (1 << 7 * length) - 1 else start + length + size
