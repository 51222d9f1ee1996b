"""Clips are exactly what decoding everything gives, and hostile files open nothing."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

av = pytest.importorskip("av")

from datamodules.fields import videos  # noqa: E402
from datamodules.fields.base import Random  # noqa: E402
from datamodules.fields.videos import Videos  # noqa: E402
from datamodules.video_files import Timeline  # noqa: E402
from fewstep.errors import FewstepError  # noqa: E402

HEIGHT, WIDTH, COUNT, RATE = 48, 64, 60, 24
MILLISECOND = Fraction(1, 1000)

# In plain C: with AVX-512, x264 gives small frames other bytes each time.
H264 = {"codec": "libx264", "g": "12", "bf": "3", "x264-params": "asm=0"}
VP9 = {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"}
FILES: dict[str, dict[str, Any]] = {
    "mp4": {"container": "mp4", **H264},
    "mov": {"container": "mov", **H264},
    "mkv": {"container": "matroska", **H264},
    "webm": {"container": "webm", **VP9},
    "piped mkv": {"container": "matroska", "piped": True, **H264},
    "piped webm": {"container": "webm", "piped": True, **VP9},
    "fragmented mp4": {"container": "mp4", "piped": True, **H264},
    "intra-refresh": {
        "container": "matroska",
        **H264,
        "bf": "0",
        "x264-params": "asm=0:intra-refresh=1",
    },
    "open GOP": {"container": "mp4", **H264, "x264-params": "asm=0:open-gop=1"},
    "variable": {"container": "mkv", "variable": True, **H264},
}


class Pipe:
    """A file that cannot be rewound, so that no duration is written."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += bytes(data)
        return len(data)


@cache
def picture() -> np.ndarray[Any, Any]:
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def moments(count: int) -> list[int]:
    """Irregular times in milliseconds; one frame stays on for a second."""
    gaps = np.random.default_rng(1).integers(10, 90, count)
    gaps[20:21] = 1000
    return [int(moment) for moment in np.cumsum(gaps)]


@cache
def video(name: str = "mp4", count: int = COUNT, **more: Any) -> bytes:
    """A film of moving blocks."""
    options = {**FILES[name], **more}
    codec, variable = options.pop("codec"), options.pop("variable", False)
    container, rotation = options.pop("container"), options.pop("rotation", None)
    container = "matroska" if container == "mkv" else container
    piped = options.pop("piped", False)
    target: Any = Pipe() if piped else io.BytesIO()
    flags = {"movflags": "frag_keyframe+empty_moov"} if piped and container == "mp4" else {}
    with av.open(target, "w", format=container, container_options=flags) as output:
        stream = output.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if variable:
            stream.codec_context.time_base = MILLISECOND
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(picture(), (2 * number, number), (0, 1)))
            if variable:
                frame.pts, frame.time_base = moments(count)[number], MILLISECOND
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return target.data if piped else target.getvalue()


def all_frames(data: bytes) -> tuple[torch.Tensor, list[float]]:
    """Every frame ``(C, n, H, W)`` and its time, by plain decoding from the start."""
    with av.open(io.BytesIO(data)) as source:
        frames = list(source.decode(video=0))
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return torch.from_numpy(pixels).permute(3, 0, 1, 2), [f.time - frames[0].time for f in frames]


def field(frames: int = 8, **options: Any) -> Videos:
    return Videos(frames, (HEIGHT, WIDTH), **options)


def drawn(seed: int) -> Random:
    return lambda: np.random.default_rng(seed)


def pixels(clip: Videos, data: bytes, random: Random | None = None) -> torch.Tensor:
    value = clip.decode(data, "mp4", random).value
    assert isinstance(value, torch.Tensor)
    return value


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The times of the frames that come out of the decoder."""
    seen: list[int] = []
    original = videos.decoded_frames

    def watched(*args: Any) -> Iterator[Any]:
        for frame in original(*args):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(videos, "decoded_frames", watched)
    return seen


# ------------------------------------------------------------------ which frames


@pytest.mark.parametrize("name", FILES)
def test_frames_are_bit_equal_to_those_of_decoding_everything(name: str) -> None:
    expected, _ = all_frames(video(name))
    assert expected.shape[1] == COUNT
    starts = set()
    for seed in range(12):
        clip = pixels(field(stride=3), video(name), drawn(seed))
        start = int(np.random.default_rng(seed).random() * (COUNT - 7 * 3))
        starts.add(start)
        assert torch.equal(clip, expected[:, start : start + 22 : 3])
    assert len(starts) > 6
    assert torch.equal(pixels(field(), video(name)), expected[:, 26:34])
    assert torch.equal(pixels(field(clip="start"), video(name)), expected[:, :8])


@pytest.mark.parametrize("name", ["mp4", "webm", "mkv", "piped webm", "variable"])
@pytest.mark.parametrize("fps", [4.0, 7.3, 12, 48])
def test_at_each_wanted_time_the_frame_a_player_would_show(name: str, fps: float) -> None:
    expected, times = all_frames(video(name))
    length = times[-1] + 1 / RATE
    if name == "variable":
        with av.open(io.BytesIO(video(name))) as source:
            packets = [p for p in source.demux(video=0) if p.size]
        length = times[-1] + (max(packets, key=lambda p: p.pts).duration or 0) / 1000
    for seed in range(8):
        clip = pixels(field(frames=6, fps=fps), video(name), drawn(seed))
        start = np.random.default_rng(seed).random() * (length - 5 / fps)
        shown = []
        for number in range(6):
            wanted = start + number / fps
            near = min(abs(wanted - time) for time in times)
            shown.append(None if near < 2e-3 else max(k for k, t in enumerate(times) if t < wanted))
        for place, number in enumerate(shown):  # within the rounding of the file's clock, either
            assert number is None or torch.equal(clip[:, place], expected[:, number])
        assert sum(number is None for number in shown) < 5


@pytest.mark.parametrize("name", ["mp4", "mkv", "webm"])
def test_half_the_frame_rate_is_every_second_frame(name: str) -> None:
    # Matroska rounds times to milliseconds, which must not move a clip by a frame.
    by_rate = pixels(field(20, fps=RATE / 2, clip="start"), video(name))
    assert torch.equal(by_rate, pixels(field(20, stride=2, clip="start"), video(name)))


def test_only_the_clip_and_what_precedes_it_from_its_keyframe_are_decoded(
    decoded: list[int],
) -> None:
    pixels(field(), video(count=240))
    assert 8 <= len(decoded) <= 8 + 12


def test_open_groups_of_pictures_are_decoded_from_their_own_keyframe(decoded: list[int]) -> None:
    for seed in range(12):
        decoded.clear()
        pixels(field(4), video("open GOP"), drawn(seed))
        assert len(decoded) <= 4 + 12 + 3


def test_every_start_is_as_likely() -> None:
    few, (expected, _) = video(count=12), all_frames(video(count=12))
    counts = np.zeros(5)
    for seed in range(200):
        clip = pixels(field(), few, drawn(seed))
        counts += [torch.equal(clip[:, 0], expected[:, start]) for start in range(5)]
    assert counts.sum() == 200
    assert counts.min() > 20  # 40 each are expected, with a deviation of 5.7


def test_evaluation_takes_the_middle_without_chance() -> None:
    expected, _ = all_frames(video())
    assert torch.equal(pixels(field(fps=RATE), video()), expected[:, 26:34])
    assert torch.equal(pixels(field(clip="middle"), video(), drawn(3)), expected[:, 26:34])


def test_nothing_is_drawn_where_nothing_is_random() -> None:
    def forbidden() -> np.random.Generator:
        raise AssertionError

    assert pixels(field(clip="start"), video(), forbidden).shape == (3, 8, HEIGHT, WIDTH)


def test_half_of_the_clips_are_mirrored_as_a_whole() -> None:
    plain = pixels(field(clip="start"), video())
    mirrored = 0
    for seed in range(60):
        clip = pixels(field(clip="start", flip=True), video(), drawn(seed))
        mirrored += torch.equal(clip, plain.flip(-1))
        assert torch.equal(clip, plain) or torch.equal(clip, plain.flip(-1))
    assert 15 < mirrored < 45
    assert torch.equal(pixels(field(clip="start", flip=True), video()), plain)


def test_the_last_frame_lasts_as_long_as_the_others_if_the_file_does_not_say() -> None:
    def packet(pts: int) -> SimpleNamespace:
        return SimpleNamespace(size=1, pts=pts, duration=None, is_discard=False)

    codec = SimpleNamespace(name="h264")
    stream: Any = SimpleNamespace(time_base=Fraction(1, 10), codec_context=codec)
    container: Any = SimpleNamespace(demux=lambda _: [packet(pts) for pts in (7, 13, 10)])
    timeline = Timeline.read(container, stream, max_frames=3)
    assert timeline.pts.tolist() == [7, 10, 13]
    assert timeline.times == pytest.approx([0, 0.3, 0.6])
    assert timeline.end == pytest.approx(0.9)


# ------------------------------------------------------------------ short clips


def test_short_files_are_skipped_with_a_reason() -> None:
    with pytest.raises(ValueError, match="short clip: 5 of 8 frames"):
        pixels(field(), video(count=5))
    with pytest.raises(ValueError, match="short clip: 3 of 8 frames"):
        pixels(field(stride=2), video(count=5))
    with pytest.raises(ValueError, match="short clip: 3 of 8 frames"):
        pixels(field(fps=12), video(count=5))


@pytest.mark.parametrize(
    ("short", "numbers"),
    [("repeat", [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]), ("pingpong", [0, 1, 2, 3, 4, 3, 2, 1, 0, 1])],
)
def test_short_files_are_lengthened_and_noted(short: Any, numbers: list[int]) -> None:
    expected, _ = all_frames(video(count=5))
    for random in (None, drawn(0)):
        result = field(10, short=short).decode(video(count=5), "mp4", random)
        assert torch.equal(result.value, expected[:, numbers])
        assert result.note == "short clip: 5 of 10 frames"
    assert field(5, short=short).decode(video(count=5), "mp4", None).note is None


def test_a_single_frame_can_be_lengthened() -> None:
    clip = pixels(field(4, short="pingpong"), video(count=1))
    assert torch.equal(clip, clip[:, :1].expand_as(clip))


# ------------------------------------------------------------------ pixels


def test_frames_cover_the_size_and_are_cropped_at_the_centre() -> None:
    clip = pixels(Videos(2, (24, 24), clip="start"), video())
    whole = pixels(Videos(2, (24, 32), clip="start"), video())
    assert torch.equal(clip, whole[..., 4:28])
    grey = pixels(Videos(2, (24, 32), clip="start", channels=1), video())[0, 0]
    full = pixels(field(2, clip="start", channels=1), video())[0, 0]
    reference = Image.fromarray(full.numpy()).resize((32, 24), Image.Resampling.BICUBIC)
    difference = torch.from_numpy(np.array(reference)).float() - grey
    assert difference.abs().mean() < 2  # a shift by a pixel makes it 14


def test_grey_is_the_luma_of_the_colours() -> None:
    rgb, grey = pixels(field(), video()).float(), pixels(field(channels=1), video())
    assert grey.shape == (1, 8, HEIGHT, WIDTH)
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    assert (grey[0] - luma).abs().max() <= 0.51


def test_a_batch_ends_up_between_minus_one_and_one() -> None:
    clips = field()
    batch = clips.finish(clips.collate([torch.tensor([0, 255], dtype=torch.uint8)] * 2))
    assert batch.dtype == torch.float32
    assert batch.tolist() == [[-1, 1], [-1, 1]]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_camera_is_turned_back(degrees: int) -> None:
    plain = pixels(field(clip="start"), video())
    turned = video(rotation=degrees)
    size = (HEIGHT, WIDTH) if degrees == 180 else (WIDTH, HEIGHT)
    with av.open(io.BytesIO(turned)) as source:
        quarters = round(next(source.decode(video=0)).rotation / 90)
    assert quarters % 4 == degrees // 90  # anticlockwise, as FFmpeg counts
    clip = pixels(Videos(8, size, clip="start"), turned)
    assert torch.equal(clip, plain.rot90(quarters, (2, 3)))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_seconds": 2.4}, "max_seconds: 2.4"),
        ({"max_frames": COUNT - 1}, f"max_frames: {COUNT - 1}"),
        ({"max_pixels": HEIGHT * WIDTH - 1}, "max_pixels: 3071"),
    ],
)
@pytest.mark.parametrize("name", ["mp4", "piped webm"])
def test_too_much_is_refused_before_decoding(
    name: str, limit: dict[str, Any], message: str, decoded: list[int]
) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(field(**limit), video(name))
    assert not decoded
    enough = {"max_seconds": 2.6, "max_frames": COUNT, "max_pixels": HEIGHT * WIDTH}
    assert pixels(field(**enough), video(name)).shape[1] == 8


def test_a_stream_larger_than_its_header_says_is_not_decoded() -> None:
    small = bytearray(video())
    entry = small.index(b"avc1", small.index(b"stsd")) + 28
    small[entry : entry + 4] = struct.pack(">HH", 16, 16)
    with pytest.raises(ValueError, match=r"0 of 8 wanted|cannot be read|pixels"):
        pixels(field(max_pixels=1024), bytes(small))


def test_a_long_thin_frame_does_not_grow_without_bound() -> None:
    with pytest.raises(ValueError, match="max_pixels"):
        pixels(Videos(2, (4096, 4)), video())


@pytest.mark.parametrize(
    ("larger", "message"), [(40, "40 x 40 pixels"), (128, "8 of 16 wanted frames")]
)
def test_frames_that_grow_within_the_stream_are_refused(larger: int, message: str) -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="webm") as output:
        stream, shift = None, 0
        for side in (32, larger):
            film = io.BytesIO()
            with av.open(film, "w", format="webm") as part:
                source = part.add_stream("libvpx-vp9", rate=RATE, options={"lag-in-frames": "0"})
                source.height = source.width = side
                for _ in range(8):
                    image = np.zeros((side, side, 3), dtype=np.uint8)
                    part.mux(source.encode(av.VideoFrame.from_ndarray(image)))
                part.mux(source.encode())
            film.seek(0)
            with av.open(film) as part:
                stream = stream or output.add_stream_from_template(part.streams.video[0])
                for packet in part.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + shift, packet.pts + shift
                        packet.stream = stream
                        output.mux(packet)
            shift = 400
    assert Videos(16, 16).decode(target.getvalue(), "webm", None).value.shape == (3, 16, 16, 16)
    with pytest.raises(ValueError, match=message):
        Videos(16, 16, max_pixels=32 * 32).decode(target.getvalue(), "webm", None)


@pytest.mark.parametrize(("name", "format"), [("mov", "mov"), ("piped webm", "matroska")])
def test_ffmpeg_is_told_the_format_and_guesses_none(
    name: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, original = [], av.open

    def recorded(*args: Any, **options: Any) -> Any:
        told.append(options["format"])
        return original(*args, **options)

    data = video(name)
    monkeypatch.setattr(av, "open", recorded)
    pixels(field(), data)
    assert told == [format]


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "<?xml version='1.0'?><MPD><BaseURL>{path}</BaseURL></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_a_playlist_named_mp4_opens_nothing(
    playlist: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video())
    data = playlist.format(path=secret).encode()
    opened: list[object] = []
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args))
    with pytest.raises(ValueError, match="no mp4, mov, webm or mkv"):
        pixels(field(), data)
    assert not opened


def test_a_playlist_behind_the_first_bytes_of_an_mp4_is_read_as_mp4(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video())
    playlist = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    hidden = struct.pack(">I4s", 16, b"ftyp") + b"isom\0\0\0\0"
    hidden += struct.pack(">I4s", 8 + len(playlist), b"free") + playlist
    with pytest.raises(ValueError, match="cannot be read"):
        pixels(field(), hidden)


def external(data: bytes, path: Path) -> bytes:
    """The same QuickTime movie, but its frames are said to lie in another file."""
    name = str(path).encode()
    name += b"\0" * (len(name) % 2)
    alias = bytes(10) + b"\x03vol".ljust(28, b"\0") + bytes(12) + b"\x03ext".ljust(64, b"\0")
    alias += bytes(16) + struct.pack(">hh", -1, -1) + bytes(16)
    alias += struct.pack(">HH", 2, len(str(path))) + name + b"\xff\xff" + bytes(40)
    entry = struct.pack(">I4sI", len(alias) + 12, b"alis", 0) + alias
    result = bytearray(data)
    first = result.index(b"dref") + 12
    old = int.from_bytes(result[first : first + 4])
    result[first : first + old] = entry
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = result.index(parent, result.index(b"moov")) - 4
        size = int.from_bytes(result[at : at + 4]) + len(entry) - old
        result[at : at + 4] = size.to_bytes(4)
    return bytes(result)


def test_tracks_in_other_files_are_not_opened(tmp_path: Path) -> None:
    film = tmp_path / "film.mov"
    film.write_bytes(video("mov"))
    crafted = external(video("mov"), film)
    follow = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(io.BytesIO(crafted), format="mov", options=follow) as source:
        assert len(list(source.decode(video=0))) == COUNT  # FFmpeg can be told to follow them
    with pytest.raises(ValueError, match="no frames"):
        pixels(field(), crafted)


def test_a_demuxer_that_asks_for_a_file_gets_none(tmp_path: Path) -> None:
    from datamodules import video_files

    film = tmp_path / "film.mov"
    film.write_bytes(video("mov"))
    with pytest.raises(PermissionError, match="another file"):
        video_files._refuse(str(film), 1, {})


def test_a_small_file_cannot_claim_many_frames() -> None:
    crafted = bytearray(video())
    table = crafted.index(b"stsz") + 8
    crafted[table : table + 8] = struct.pack(">II", 1, 20_000_000)
    with pytest.raises(ValueError, match="damaged: frames of 20000000 bytes"):
        pixels(field(), bytes(crafted))


def test_sound_alone_is_no_video() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        output.mux(stream.encode(sound))
        output.mux(stream.encode())
    with pytest.raises(ValueError, match="no video stream"):
        pixels(field(), target.getvalue())


def test_an_unusual_codec_is_not_decoded() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(8):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture())))
        output.mux(stream.encode())
    with pytest.raises(ValueError, match="codec is none of h264"):
        pixels(field(), target.getvalue())


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["mp4", "mov", "mkv", "webm", "fragmented mp4"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_file_that_was_cut_off_is_named_so(name: str, share: float) -> None:
    data = video(name)
    with pytest.raises(ValueError, match=r"truncated: .* of at least"):
        pixels(field(), data[: int(len(data) * share)])


def test_a_cut_stream_that_states_no_length_gives_what_it_has() -> None:
    expected, _ = all_frames(video("piped mkv"))
    data = video("piped mkv")
    cut = data[: len(data) // 2]
    assert torch.equal(pixels(field(clip="start"), cut), expected[:, :8])


def test_wanted_frames_that_cannot_be_decoded_are_counted() -> None:
    data = bytearray(video())
    middle = data.index(b"mdat") + len(data) // 3
    data[middle : middle + 400] = bytes(400)
    with pytest.raises(ValueError, match=r"truncated or damaged: \d+ of 50 wanted frames"):
        pixels(field(50), bytes(data))


def painted_over() -> Iterator[tuple[int, bytes]]:
    """Files in which FFmpeg paints over damage without an error, and in which of frames 0 to 8."""
    for place in range(video().index(b"mdat") + 800, len(video()) // 2, 50):
        data = bytearray(video())
        data[place : place + 8] = bytes(8)
        with av.open(io.BytesIO(data)) as source:
            try:
                frames = list(source.decode(video=0))
            except av.FFmpegError:
                continue
        corrupt = [number for number, frame in enumerate(frames) if frame.is_corrupt]
        if len(frames) == COUNT and corrupt and corrupt[0] < 9:
            yield corrupt[0], bytes(data)


def test_frames_that_build_on_damaged_ones_are_not_given_out() -> None:
    files = list(painted_over())
    assert files
    for corrupt, data in files:
        with pytest.raises(ValueError, match=rf"{corrupt} of 60 wanted frames"):
            pixels(field(COUNT), data)
        after: Any = SimpleNamespace(random=lambda start=corrupt + 1: (start + 0.5) / (COUNT - 1))
        with pytest.raises(ValueError, match="0 of 2 wanted frames"):
            pixels(field(2), data, lambda generator=after: generator)
        expected, _ = all_frames(data)
        assert torch.equal(pixels(field(), data), expected[:, 26:34])  # from another keyframe on


@pytest.mark.parametrize("data", [b"", b"\x1a\x45\xdf\xa3", b"\0\0\0\x10ftypisom\0\0\0\0"])
def test_a_file_without_contents_is_damaged(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no mp4|cannot be read|no video|no frames"):
        pixels(field(), data)


@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_scrambled_files_give_frames_or_a_value_error(name: str) -> None:
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = bytearray(video(name))
        for place in rng.integers(4, len(data), 30):
            data[place] = rng.integers(256)
        try:
            assert pixels(field(), bytes(data)).shape == (3, 8, HEIGHT, WIDTH)
        except ValueError:
            refused += 1
    assert refused > 10


def test_frames_that_vp8_only_refers_to_are_no_frames_of_the_clip() -> None:
    options = {"codec": "libvpx", "g": "12", "deadline": "realtime", "cpu-used": "8"}
    source = av.open(io.BytesIO(video("webm", **options)))
    target = io.BytesIO()
    with av.open(target, "w", format="webm") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            content = bytearray(bytes(packet))
            if number == 30:
                content[0] &= ~0x10  # the frame is decoded but not shown
            hidden = av.Packet(bytes(content))
            hidden.pts, hidden.dts = packet.pts, packet.dts
            hidden.time_base, hidden.is_keyframe = packet.time_base, packet.is_keyframe
            hidden.stream = stream
            output.mux(hidden)
    expected, _ = all_frames(target.getvalue())
    assert expected.shape[1] == COUNT - 1
    assert torch.equal(pixels(field(COUNT - 1), target.getvalue()), expected)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 8, "stride": 2}, "fps or stride, not both"),
        ({"fps": 0}, "greater than 0"),
        ({"stride": 0}, "greater than 0"),
        ({"frames": 0}, "greater than 0"),
        ({"channels": 2}, r"1 \(grey\) or 3 \(RGB\), not 2"),
    ],
)
def test_contradictions_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        field(**options)


def test_a_missing_pyav_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[video\]'"):
        field()
