"""Indexes of shards: what they hold, what they refuse, and how they age."""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from safetensors import safe_open
from safetensors.numpy import save_file

from datamodules.catalogue import catalogue
from datamodules.fields import image_shape
from datamodules.index import SUFFIX, ShardIndex, scan, summary
from datamodules.sources import Sources
from fewstep.errors import FewstepError

from shard_files import png, write_numbered, write_tar


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_raw(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def test_an_index_finds_what_webdataset_reads(tmp_path: Path) -> None:
    names = ["a", "b/c", "b/d.e", "x" * 150, "ü"]
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, name in enumerate(names):
            key = name.partition(".")[0]
            writer.write({"__key__": key, "txt": name.encode(), "Cls": str(number).encode()})
    shard = tmp_path / "a.tar"
    index = scan(shard)
    data = shard.read_bytes()
    mine = {}
    for number in range(len(index)):
        record = index.record(number, str(shard))
        mine[record.key] = {e: data[o : o + n] for e, (o, n) in record.parts.items()}
    theirs = wds.WebDataset(str(shard), shardshuffle=False)
    assert mine == {s["__key__"]: {"txt": s["txt"], "cls": s["cls"]} for s in theirs}
    assert len(mine) == 5


def test_an_index_survives_being_saved(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.png": png(1, 4, 6), "k.cls": b"1", "ü.cls": b"2"})
    index = scan(shard, measure=image_shape)
    index.save(tmp_path / "a.tar.index")
    again = ShardIndex.load(tmp_path / "a.tar.index")
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a.tar.index").read_bytes()
    for number in range(2):
        assert again.record(number, "s") == index.record(number, "s")
    assert again.record(1, "s").parts.keys() == {"cls"}
    assert again.shapes is not None
    assert again.shapes.tolist() == [[4, 6], [0, 0]]
    about = summary(tmp_path / "a.tar.index")
    assert (about.records, about.tar_bytes, about.has_shapes) == (2, shard.stat().st_size, True)
    assert about.last[0] == "ü.cls"
    assert about.speaks_of(shard)


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([member("a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "a link, a device"),
        ([member("a.png", type=tarfile.LNKTYPE, linkname="b")], "a link, a device"),
        ([member("a.png", type=tarfile.CHRTYPE)], "a link, a device"),
        ([member("/etc/a.png")], "leads outside"),
        ([member("../../a.png")], "leads outside"),
        ([member("a.png", b"x" * 2000)], "more than max_member_bytes: 1,000"),
        ([member("a.png"), member("a.png")], "twice"),
        ([member("a.png"), member("a.PNG")], "twice"),
        ([], "holds no records"),
        ([member(".DS_Store")], "holds no records"),
    ],
)
def test_shards_that_hold_what_none_should_are_refused(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], what: str
) -> None:
    with pytest.raises(FewstepError, match=what):
        scan(write_raw(tmp_path / "hostile.tar", *members), max_member_bytes=1000)


def test_a_sparse_member_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.npy")
    info.size = 0
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1"} | {
        "GNU.sparse.size": str(2**31),
        "GNU.sparse.map": "0,0",
    }
    shard = write_raw(tmp_path / "sparse.tar", (info, b""))
    with pytest.raises(FewstepError, match="sparse"):
        scan(shard)


def test_a_compressed_shard_is_not_inflated(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bomb.tar", "w:gz") as tar:
        info, data = member("a.npy", bytes(10**6))
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(FewstepError, match="plain, uncompressed tar"):
        scan(tmp_path / "bomb.tar")


@pytest.mark.parametrize("length", [0, 700, 1100, 3000])
def test_a_truncated_shard_is_named(tmp_path: Path, length: int) -> None:
    shard = write_tar(tmp_path / "cut.tar", {f"{n}.bin": bytes(1000) for n in range(9)})
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(FewstepError, match=r"cut\.tar"):
        scan(shard)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None])
def test_a_damaged_index_says_so(tmp_path: Path, damage: bytes | None) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.cls": b"1"})
    file = tmp_path / "a.tar.index"
    scan(shard).save(file)
    file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(FewstepError, match="delete it and it is made anew"):
        ShardIndex.load(file)


def without_contents(path: Path) -> None:
    """Turns an index into one that an older version made."""
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["about"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about.pop("contents")
    save_file(arrays, path, {"about": json.dumps(about)})


def test_an_older_index_of_a_local_shard_is_made_anew_once(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", [3, 4])
    sources = Sources(str(tmp_path / "cache"))
    shards = sources.expand(str(folder))
    for shard in shards:
        scan(Path(shard)).save(Path(shard + SUFFIX))
    digest = catalogue(sources, shards).digest()
    for shard in shards:
        without_contents(Path(shard + SUFFIX))
    again = catalogue(sources, shards)
    assert (again.digest(), again.sizes) == (digest, [3, 4])
    assert all(tmp_path / "cache" in file.parents for file in again.files)
    made = [file.stat().st_mtime_ns for file in again.files]
    assert catalogue(sources, shards).digest() == digest
    assert [file.stat().st_mtime_ns for file in again.files] == made


def test_an_older_index_beside_a_remote_shard_is_completed_without_fetching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(tmp_path, [3])
    scan(tmp_path / "part-000.tar").save(tmp_path / "beside")
    without_contents(tmp_path / "beside")
    sources = Sources(str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "companion", lambda address, suffix: tmp_path / "beside")
    shards = ["https://host/part-000.tar"]
    found = catalogue(sources, shards)
    assert found.sizes == [3]
    assert found.contents[0].split()[1], "it has no name for the contents"
    assert found.digest() == catalogue(sources, shards).digest()
    (tmp_path / "beside").unlink()
    assert catalogue(sources, shards).digest() == found.digest()


@pytest.mark.parametrize(
    ("part", "byte"), [("a.txt", 0), ("a.txt", 599), ("b.bin", 0), ("b.bin", 1500)]
)
def test_contents_of_the_same_size_have_other_names(tmp_path: Path, part: str, byte: int) -> None:
    """In a small part, and at the beginning and in the middle of a large one."""
    members = {"a.txt": bytes(600), "b.bin": bytes(3000)}
    before = scan(write_tar(tmp_path / "a.tar", members))
    changed = bytearray(members[part])
    changed[byte] = 1
    after = scan(write_tar(tmp_path / "b.tar", members | {part: bytes(changed)}))
    assert after.contents != before.contents
    assert (after.keys, after.tar_bytes) == (before.keys, before.tar_bytes)
    assert scan(write_tar(tmp_path / "c.tar", members)).contents == before.contents


def test_processes_may_make_one_index_at_once(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", [40] * 6)
    sources = Sources(str(tmp_path / "cache"))
    shards = sources.expand(str(folder))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: catalogue(sources, shards).digest(), range(8)))
    assert len(set(found)) == 1
    assert len(list((tmp_path / "cache" / "own").iterdir())) == 6, "something was left behind"


def test_the_first_records_of_a_catalogue_are_in_order(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", [3, 4, 2])
    sources = Sources(str(tmp_path / "cache"))
    whole = catalogue(sources, sources.expand(str(folder)))
    assert [whole.first(count).sizes for count in (1, 3, 4, 7, 9, 99)] == [
        [1],
        [3],
        [3, 1],
        [3, 4],
        [3, 4, 2],
        [3, 4, 2],
    ]
    assert whole.first(4).shards == whole.shards[:2]
    assert whole.sizes == [3, 4, 2]


def test_indexes_are_made_in_the_cache_and_side_cars_are_preferred(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", [3, 4])
    sources = Sources(str(tmp_path / "cache"))
    shards = sources.expand(str(folder))
    found = catalogue(sources, shards)
    assert found.sizes == [3, 4]
    assert not list(folder.glob(f"*{SUFFIX}")), "somebody else's folder was written to"
    assert all(tmp_path / "cache" in file.parents for file in found.files)
    for shard in shards:
        scan(Path(shard)).save(Path(shard + SUFFIX))
    beside = catalogue(sources, shards)
    assert [file.parent for file in beside.files] == [folder, folder]


def test_an_index_of_another_size_or_without_shapes_is_made_anew(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "shards", [3])
    sources = Sources(str(tmp_path / "cache"))
    (shard,) = sources.expand(str(folder))
    scan(Path(shard)).save(Path(shard + SUFFIX))
    write_numbered(folder, [300])
    assert catalogue(sources, [shard]).sizes == [300]
    assert catalogue(sources, [shard]).index(0).shapes is None
    shapes = catalogue(sources, [shard], measure=image_shape).index(0).shapes
    assert shapes is not None
    assert np.array_equal(shapes, np.full((300, 2), 8))


@pytest.mark.parametrize("sizes", [[5], [7]])
def test_a_shard_rewritten_to_the_same_length_is_noticed(tmp_path: Path, sizes: list[int]) -> None:
    folder = write_numbered(tmp_path / "shards", [6])
    sources = Sources(str(tmp_path / "cache"))
    (shard,) = sources.expand(str(folder))
    assert catalogue(sources, [shard]).sizes == [6]
    before = Path(shard).stat().st_size
    write_numbered(folder, sizes)
    assert Path(shard).stat().st_size == before, "tars are padded to 10,240 bytes"
    assert catalogue(sources, [shard]).sizes == sizes


@pytest.mark.slow
def test_many_shards_are_indexed_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.catalogue.PARALLEL_FROM", 3)
    folder = write_numbered(tmp_path / "shards", [2] * 17)
    sources = Sources(str(tmp_path / "cache"))
    assert catalogue(sources, sources.expand(str(folder))).sizes == [2] * 17
