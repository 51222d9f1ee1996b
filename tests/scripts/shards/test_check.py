"""Checking shards: what is counted, what is found to be wrong, and the contact sheet."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from datamodules.moving_clips import Scene, moving_digits_record
from scripts.main import main as fewstep
from scripts.shards import main, parser
from scripts.shards.census import Census, aspect, spread
from scripts.shards.inspection import Findings
from scripts.shards.moments import Moments
from scripts.shards.tars import index_path

from shard_files import png, write_tar


def check(shards: str | Path, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The command's status and what it writes."""
    file = tmp_path / "found.json"
    arguments = ["check", str(shards), "--workers", "1", "--json", str(file), *options]
    parsed = parser().parse_args(arguments)
    return parsed.run(parsed), json.loads(file.read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of images with captions, one of them empty, and labels."""
    folder = tmp_path / "shards"
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(3 + shard):
            key = f"{shard}-{number}"
            members[f"{key}.png"] = png(10 * shard + number, 9, 16 if number else 9)
            members[f"{key}.txt"] = b"x" * number
            members[f"{key}.cls"] = str(number % 2).encode()
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


def test_it_counts_what_is_there(folder: Path, tmp_path: Path, capsys: Any) -> None:
    status, found = check(folder, tmp_path)
    assert status == 0
    assert (found["shards"], found["records"]) == (2, 7)
    assert found["records_per_shard"] == {"min": 3, "median": 3, "max": 4}
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["parts"] == {"cls": 7, "png": 7, "txt": 7}
    assert found["images"]["most_common"] == {"16 x 9": 5, "9 x 9": 2}
    assert found["images"]["aspects"] == {"16:9": 5, "1:1": 2}
    assert found["captions"] == {"empty": 2, "characters": {"min": 0, "median": 1, "max": 3}}
    assert found["classes"] == {"0": 4, "1": 3}
    assert "nothing is corrupt, and nothing is there twice" in capsys.readouterr().out


def test_corrupt_records_are_named_with_their_reasons(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = {
        "a.png": png(50)[:50],
        "b.cls": b"seven",
        "c.json": b"{",
        "d.latent.npy": b"\x93NUMPY",
        "e.txt": b"\xff",
        "f.text.safetensors": save({"x": np.array([np.nan], np.float32)}),
        "g.png": png(51),
    }
    write_tar(folder / "part-2.tar", broken)
    status, found = check(folder, tmp_path)
    assert status == 1
    named = {entry["key"]: entry["reason"] for entry in found["corrupt_records"]}
    assert sorted(named) == list("abcdef")
    assert "no integer" in named["b"]
    assert "not finite" in named["f"]
    assert all(entry["shard"].endswith("part-2.tar") for entry in found["corrupt_records"])
    assert "part-2.tar/b: cls: its class label is no integer" in capsys.readouterr().out


def test_damaged_shards_do_not_stop_it(folder: Path, tmp_path: Path) -> None:
    (folder / "part-2.tar").write_bytes(b"no tar at all")
    status, found = check(folder, tmp_path)
    assert status == 1
    assert [Path(name).name for name in found["damaged_shards"]] == ["part-2.tar"]
    assert found["records"] == 7


def test_an_index_of_another_shard_is_noticed(folder: Path, tmp_path: Path) -> None:
    main(["index", str(folder), "--workers", "1"])
    assert check(folder, tmp_path)[0] == 0
    index_path(folder / "part-1.tar").replace(index_path(folder / "part-0.tar"))
    status, found = check(folder, tmp_path)
    assert status == 1
    (why,) = found["damaged_shards"].values()
    assert "fewstep shards index --force" in why


def test_duplicates_are_found_across_shards(folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = {"0-1.png": png(77), "new.png": png(0, 9, 9), "newer.png": png(0, 9, 9)}
    write_tar(folder / "part-2.tar", more)
    status, found = check(folder, tmp_path)
    assert status == 1
    assert found["duplicate_keys"] == {
        "surplus": 1,
        "first": [["part-0.tar/0-1", "part-2.tar/0-1"]],
    }
    assert found["duplicate_contents"] == {
        "surplus": 2,
        "first": [["part-0.tar/0-0", "part-2.tar/new", "part-2.tar/newer"]],
    }
    assert "DUPLICATE KEYS: 1" in capsys.readouterr().out


def test_many_groups_of_equals_are_told_apart() -> None:
    census = Census()
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 300, (4, 100))
    for shard, row in enumerate(numbers):
        digests = b"".join(int(n).to_bytes(16) for n in row)
        census.add(Findings(str(shard), records=100, contents=bytearray(digests)))
    found = census.duplicates(census.sums.contents)
    assert found.surplus == numbers.size - len(np.unique(numbers))
    for group in found.groups:
        values = {int(numbers[int(shard), place]) for shard, place in group}
        (value,) = values
        assert len(group) == int((numbers == value).sum())


def test_latents_have_their_mean_and_standard_deviation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(2.0, 3.0, (50, 4, 8, 8)).astype(np.float32)
    stds = np.full_like(means, 0.5)
    members = {
        f"{n}.latent.safetensors": save({"mean": means[n], "std": stds[n]}) for n in range(50)
    }
    write_tar(tmp_path / "latents" / "a.tar", members)
    status, found = check(tmp_path / "latents", tmp_path)
    (latent,) = found["latents"].values()
    assert status == 0
    assert latent["mean"] == pytest.approx(float(means.mean()), rel=1e-5)
    expected = np.sqrt(means.std(axis=(0, 2, 3)) ** 2 + 0.25)
    assert latent["channel_stds"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_videos_are_measured_and_truncated_ones_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    scene = Scene(num_frames=6, size=16, fps=4)
    made = [moving_digits_record(n, 0, "clear", "train", scene)["mp4"] for n in range(3)]
    members = {f"{n}.mp4": video for n, video in enumerate(made)}
    members["2.mp4"] = made[2][:-400]
    start = made[0].index(b"mdat") + 4
    members["3.mp4"] = made[0][: start + 900] + bytes(len(made[0]) - start - 900)
    header = made[0].index(b"moov") - 4
    if header > start:  # only the frames are lost, not the list of them
        lost = bytes(header - start - 900)
        members["3.mp4"] = made[0][: start + 900] + lost + made[0][header:]
    write_tar(tmp_path / "videos" / "a.tar", members)
    status, found = check(tmp_path / "videos", tmp_path)
    assert status == 1
    assert found["videos"]["most_common"] == {"16 x 16": 2}
    assert found["videos"]["frames"] == {"min": 6, "median": 6, "max": 6}
    assert found["videos"]["fps"]["median"] == 4
    assert found["videos"]["seconds"]["median"] == 1.5
    assert [entry["key"] for entry in found["corrupt_records"]] == ["2", "3"]
    assert "frames cannot be decoded" in found["corrupt_records"][1]["reason"]


def test_the_contact_sheet_shows_records_of_all_shards(folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "sheet.png"
    for shard, value in ((2, 200), (3, 250)):
        write_tar(folder / f"part-{shard}.tar", {f"{shard}.png": png(value, 40, 40)})
    check(folder, tmp_path, "--sheet", str(sheet), "--pictures", "8")
    pixels = np.asarray(Image.open(sheet).convert("L"))
    for value in (0, 10, 200, 250):  # pictures of each of the four shards
        assert (pixels == value).sum() > 160 * 80


@pytest.mark.slow
def test_remote_shards_are_checked_too(folder: Path, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/part-{{0..1}}.tar"
        status, found = check(address, tmp_path)
        server.shutdown()
    assert (status, found["records"]) == (0, 7)


def test_the_front_door_passes_the_status_on(folder: Path) -> None:
    write_tar(folder / "part-2.tar", {"a.png": b"no picture"})
    with pytest.raises(SystemExit) as finished:
        fewstep(["shards", "check", str(folder), "--workers", "1"])
    assert finished.value.code == 1


def test_small_sums() -> None:
    assert spread(Counter({1: 3, 5: 1, 9: 3})) == {"min": 1, "median": 5, "max": 9}
    assert [aspect(9, 16), aspect(100, 100), aspect(16, 9), aspect(3, 2)] == [
        "16:9",
        "1:1",
        "9:16",
        "2:3",
    ]
    values = np.arange(24.0).reshape(2, 3, 4)
    joined = Moments.of(values[:, :1]) + Moments.of(values[:, 1:])
    assert joined.mean.tolist() == values.reshape(2, -1).mean(axis=1).tolist()
    assert joined.overall()[1] == pytest.approx(values.std())
