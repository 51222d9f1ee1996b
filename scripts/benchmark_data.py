"""Our shards against plain webdataset pipelines with the same decoding, as ratios from one run.

    python -m scripts.benchmark_data --workers 2 --records 4000

Shards are written to a temporary folder first. Blocks of batches of the two alternate, and the
median block of each is compared. The images and latents are decoded by the very same functions on
both sides; for videos the other side decodes every frame of a file and then picks, which is what a
pipeline does that cannot seek. Last, it is timed how soon a stream of a million small records that
goes on at 90 % of its epoch has its first batch.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image
from tqdm import tqdm

from datamodules import Shards
from datamodules.fields import Field, Images, Latents, Videos
from datamodules.index import SUFFIX, scan

Make = Callable[[int], dict[str, bytes]]
MILLION = 1_000_000


def jpeg(size: int, number: int) -> dict[str, bytes]:
    """A smooth picture with some noise, as compressible as a photograph."""
    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = np.clip(smooth + draws.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return {"jpg": buffer.getvalue()}


def latent(shape: tuple[int, ...], number: int) -> dict[str, bytes]:
    """A float16 latent."""
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(number).standard_normal(shape).astype(np.float16))
    return {"npy": buffer.getvalue()}


def film(size: int, frames: int, number: int) -> dict[str, bytes]:
    """An h264 video of a drifting texture."""
    import av

    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((2 * size, 2 * size), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "24"}
        for t in range(frames):
            view = np.ascontiguousarray(texture[2 * t : 2 * t + size, t : t + size])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())
    return {"mp4": buffer.getvalue()}


def every_frame(data: bytes, frames: int, size: int) -> np.ndarray[Any, Any]:
    """Decodes and converts a whole file, as readers without seeking do, then takes its middle."""
    import av

    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        found = [
            frame.reformat(size, size, format="rgb24").to_ndarray()
            for frame in container.decode(video=0)
        ]
    start = (len(found) - frames) // 2
    return np.stack(found[start : start + frames]).transpose(3, 0, 1, 2)


def write(folder: Path, make: Make, records: int, per_shard: int) -> Path:
    """Writes shards with their indexes."""
    folder.mkdir(parents=True)
    writer = wds.ShardWriter(str(folder / "%06d.tar"), maxcount=per_shard, verbose=0)
    with writer:
        for number in tqdm(range(records), f"Writing {folder.name}", leave=False, disable=None):
            writer.write({"__key__": f"{number:08d}", **make(number)})
    for shard in sorted(folder.glob("*.tar")):
        scan(shard).save(Path(f"{shard}{SUFFIX}"))
    return folder


def ours(folder: Path, field: Field, options: argparse.Namespace, updates: int = 0) -> Shards:
    """Our datamodule, at a given update."""
    data = Shards(str(folder), str(folder), options.batch, field, num_workers=options.workers)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, global_step=updates
    )
    data.setup()
    return data


def theirs(
    folder: Path, extension: str, decode: Callable[[bytes], Any], options: argparse.Namespace
) -> Iterable[Any]:
    """A plain webdataset pipeline that shuffles and decodes, endlessly."""
    shards = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False, empty_check=False)
    data = data.shuffle(1000).to_tuple(extension, "__key__").map_tuple(decode, str)
    return wds.WebLoader(data.batched(options.batch), batch_size=None, num_workers=options.workers)


def batches_per_second(
    streams: list[Iterator[Any]], blocks: int, length: int, prefetched: int
) -> list[float]:
    """The median speed of each stream; their blocks take turns, so that both meet the same load.

    What a stream has prefetched while the other was timed is read first and not timed.
    """
    for stream in streams:
        next(stream)
    speeds: list[list[float]] = [[] for _ in streams]
    for block in range(blocks):
        for number in range(len(streams)) if block % 2 else reversed(range(len(streams))):
            list(itertools.islice(streams[number], prefetched))
            begun = time.perf_counter()
            for _ in itertools.islice(streams[number], length):
                pass
            speeds[number].append(length / (time.perf_counter() - begun))
    return [statistics.median(found) for found in speeds]


def compare(
    name: str, mine: Shards, other: Iterable[Any], options: argparse.Namespace, length: int
) -> None:
    """Prints the speeds of both and their ratio."""
    streams: list[Iterator[Any]] = [iter(mine.train_dataloader()), iter(other)]
    found = batches_per_second(streams, options.blocks, length, 3 * options.workers)
    speeds = [speed * options.batch for speed in found]
    print(
        f"{name:28} fewstep {speeds[0]:9.1f}/s   plain webdataset {speeds[1]:9.1f}/s   "
        f"ratio {speeds[0] / speeds[1]:.2f}",
        flush=True,
    )


def tensor_of(field: Field, extension: str) -> Callable[[bytes], Any]:
    """The field's own decoding, as a function of bytes."""
    return lambda data: field.decode(data, extension, None).value


def throughput(root: Path, options: argparse.Namespace) -> None:
    """Compares on images, latents and videos."""
    for size in (64, 256):
        folder = write(root / f"images_{size}", partial(jpeg, size), options.records, 500)
        field = Images(size=size)
        other = theirs(folder, "jpg", tensor_of(field, "jpg"), options)
        compare(f"images, JPEG {size}", ours(folder, field, options), other, options, 12)
    folder = write(root / "latents", partial(latent, (4, 32, 32)), options.records, 500)
    latents = Latents()
    other = theirs(folder, "npy", tensor_of(latents, "npy"), options)
    compare("latents, 4 x 32 x 32", ours(folder, latents, options), other, options, 40)
    options.batch = 8
    folder = write(root / "videos", partial(film, 256, 96), options.videos, 16)
    videos = Videos(frames=16, size=256)
    decode = partial(every_frame, frames=16, size=256)
    other = theirs(folder, "mp4", decode, options)
    compare("videos, 16 of 96 frames", ours(folder, videos, options), other, options, 2)


def resume(root: Path, options: argparse.Namespace) -> None:
    """Times the first batch at 90 % of a million records, indexes and all."""
    small = latent((1, 2, 2), 0)
    folder = write(root / "million", lambda number: small, MILLION, 10_000)
    begun = time.perf_counter()
    data = ours(folder, Latents(), options, updates=int(0.9 * MILLION) // options.batch)
    next(iter(data.train_dataloader()))
    took = time.perf_counter() - begun
    print(f"first batch at 90 % of {MILLION:,} records: {took:.2f} s")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="loading processes of each side")
    parser.add_argument("--records", type=int, default=4000, help="images, and latents")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=9, help="timed blocks of each side")
    parser.add_argument("--skip-resume", action="store_true", help="leave out the million records")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        throughput(Path(root), options)
        if not options.skip_resume:
            resume(Path(root), options)


if __name__ == "__main__":
    main()
