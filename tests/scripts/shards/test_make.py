"""Making and indexing shards: what becomes a record, where it goes, and going on where one was."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from sklearn.datasets import load_digits

from datamodules.index import ShardIndex, scan
from fewstep.errors import FewstepError
from scripts.shards import main, parallel, tars
from scripts.shards.entries import Files, safe_key
from scripts.shards.plan import arrange

from shard_files import encoded, png, write_tar


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of ten pictures each, most with captions."""
    folder = tmp_path / "pictures"
    for number in range(20):
        kind = "dogs" if number % 2 else "cats"
        put(folder / kind / f"{number:02d}.png", png(number, height=4 + number % 3, width=6))
        put(folder / kind / f"{number:02d}.txt", f"picture {number}".encode())
    return folder


def make_shards(dest: Path, source: Path | str, *options: str) -> Path:
    main(["make", str(dest), "--from", str(source), "--workers", "1", *options])
    return dest


def records(folder: Path, pattern: str = "*.tar") -> dict[str, dict[str, bytes]]:
    """What the webdataset library itself reads."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(pattern)):
        for sample in wds.WebDataset(str(shard), shardshuffle=False):
            assert sample["__key__"] not in found
            found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return found


def contents(folder: Path) -> dict[str, object]:
    """Of every file of a folder; indexes as they read, since their headers have no fixed order."""
    return {
        path.name: str(ShardIndex.load(path)) if path.suffix == ".index" else path.read_bytes()
        for path in sorted(folder.iterdir())
    }


def test_files_of_one_name_become_one_record(tmp_path: Path, pictures: Path) -> None:
    put(pictures / "cats" / "00.latent.npy", b"numbers")
    dest = make_shards(tmp_path / "dest", pictures, "--labels", "folders")
    found = records(dest)
    assert len(found) == 20
    assert found["cats/00"] == {
        "png": png(0, 4, 6),
        "txt": b"picture 0",
        "cls": b"0",
        "latent.npy": b"numbers",
    }
    assert found["dogs/01"]["cls"] == b"1"
    assert json.loads((dest / "classes.json").read_text()) == ["cats", "dogs"]


def test_names_with_dots_become_keys_that_stay_apart(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    for name in ("a.b", "a_b", "a", "ä ö"):
        put(folder / f"{name}.jpg", encoded(np.zeros((4, 4), np.uint8), "JPEG"))
        put(folder / f"{name}.txt", name.encode())
    put(folder / "orphan.txt", b"no picture")
    found = records(make_shards(tmp_path / "dest", folder))
    assert {parts["txt"].decode() for parts in found.values()} == {"a.b", "a_b", "a", "ä ö"}
    assert {"a", "a_b"} <= set(found)
    assert all("." not in key for key in found)
    assert safe_key("a/b") == "a/b"


def test_the_index_beside_each_shard_knows_shapes(tmp_path: Path, pictures: Path) -> None:
    dest = make_shards(tmp_path / "dest", pictures, "--records-per-shard", "7")
    sizes = []
    for shard in sorted(dest.glob("*.tar")):
        index = ShardIndex.load(tars.index_path(shard))
        assert index.keys == scan(shard).keys
        assert index.shapes is not None
        heights = [4 + int(key[-2:]) % 3 for key in index.keys]
        assert index.shapes.tolist() == [[height, 6] for height in heights]
        sizes.append(len(index))
    assert sizes == [7, 7, 6]


def test_shards_are_shuffled_by_default_and_on_request_are_not(
    tmp_path: Path, pictures: Path
) -> None:
    plain = list(records(make_shards(tmp_path / "plain", pictures, "--no-shuffle")))
    mixed = list(records(make_shards(tmp_path / "mixed", pictures)))
    other = list(records(make_shards(tmp_path / "other", pictures, "--shuffle", "1")))
    assert plain == sorted(plain)
    assert sorted(mixed) == sorted(other) == plain
    assert plain != mixed != other != plain


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fork server would import everything anew, which takes far longer than this test.
    monkeypatch.setattr(parallel, "fork_server", lambda: get_context("fork"))
    alone = make_shards(tmp_path / "alone", pictures, "--records-per-shard", "6")
    os.utime(pictures / "cats" / "00.png", (1, 1))
    several = tmp_path / "several"
    options = ["--from", str(pictures), "--records-per-shard", "6", "--workers", "2"]
    main(["make", str(several), *options])
    first, second = contents(alone), contents(several)
    first.pop("make.json"), second.pop("make.json")  # that knows the times of the files
    assert len(first) == 8
    assert first == second


def test_the_held_out_records_stay_the_same_as_data_grows() -> None:
    entries = [Files(f"key-{n}", None, ()) for n in range(2000)]
    few = {e.key for e in arrange(entries[:1000], 0, 0.1)["val"]}
    many = {e.key for e in arrange(entries, 7, 0.1)["val"]}
    assert few == {key for key in many if int(key[4:]) < 1000}
    assert len(many) == pytest.approx(200, abs=50)


def _reciprocal(number: int) -> float:
    if not number:
        raise FewstepError("nothing divides by zero")
    time.sleep(0.1 / number)  # the first take longest
    return 1 / number


def test_work_shared_out_keeps_its_order_and_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "fork_server", lambda: get_context("fork"))
    found = parallel.in_parallel(_reciprocal, [1, 2, 4, 8], 3, "Dividing")
    assert list(found) == [1, 0.5, 0.25, 0.125]
    with pytest.raises(FewstepError, match="divides by zero"):
        list(parallel.in_parallel(_reciprocal, [1, 2, 0], 2, "Dividing"))


def test_a_killed_worker_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "fork_server", lambda: get_context("fork"))
    with pytest.raises(FewstepError, match="A worker process was killed"):
        list(parallel.in_parallel(os._exit, [9, 9], 2, "Dying"))


def test_a_stopped_run_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ("--records-per-shard", "5", "--val-share", "0.2")
    whole = contents(make_shards(tmp_path / "whole", pictures, *options))
    dest = tmp_path / "stopped"
    read = Files.parts
    reads = 0

    def interrupted(entry: Files) -> dict[str, bytes]:
        nonlocal reads
        reads += 1
        if reads == 8:
            raise KeyboardInterrupt
        return read(entry)

    monkeypatch.setattr(Files, "parts", interrupted)
    with pytest.raises(SystemExit) as stopped:
        make_shards(dest, pictures, *options)
    assert stopped.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err
    put(dest / f"train-000001.tar{tars.PARTIAL}0123", b"of a process that was killed")
    make_shards(dest, pictures, *options)
    assert reads == 8 + 20 - 5  # the first shard is not read again
    assert contents(dest) == whole


def test_another_plan_is_refused_by_name(tmp_path: Path, pictures: Path) -> None:
    dest = make_shards(tmp_path / "dest", pictures)
    with pytest.raises(FewstepError, match="records_per_shard was 1000 and is now 5"):
        make_shards(dest, pictures, "--records-per-shard", "5")
    put(pictures / "cats" / "new.png", png(99))
    with pytest.raises(FewstepError, match="contents was"):
        make_shards(dest, pictures)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_row_becomes_a_record(tmp_path: Path, pictures: Path, kind: str) -> None:
    rows = [
        {"file": f"cats/{n:02d}.png", "text": f"cat {n}", "class": c, "likes": n, "rest": "x"}
        for n, c in ((0, "tabby"), (2, "black"), (4, "tabby"))
    ]
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        write_csv(table, rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    columns = ["--path-column", "file", "--caption-column", "text", "--label-column", "class"]
    columns += ["--json-columns", "likes", "--root", str(pictures)]
    dest = make_shards(tmp_path / "dest", table, *columns)
    found = records(dest)
    likes = 4 if kind == "parquet" else "4"
    assert found["cats/04"] == {
        "png": png(4, 5, 6),
        "txt": b"cat 4",
        "cls": b"1",
        "json": json.dumps({"likes": likes}).encode(),
    }
    assert json.loads((dest / "classes.json").read_text()) == ["black", "tabby"]


def test_whole_numbers_stay_the_class_labels_they_are(tmp_path: Path, pictures: Path) -> None:
    rows = [{"path": f"cats/{n:02d}.png", "label": n + 7} for n in (0, 2)]
    table = write_csv(pictures / "table.csv", rows)
    dest = make_shards(tmp_path / "dest", table, "--label-column", "label")
    assert {parts["cls"] for parts in records(dest).values()} == {b"7", b"9"}
    assert not (dest / "classes.json").exists()


def test_missing_files_are_named_before_anything_is_written(tmp_path: Path, pictures: Path) -> None:
    rows = [{"path": f"cats/{n:02d}.png"} for n in range(12)]
    table = write_csv(pictures / "table.csv", rows)
    dest = tmp_path / "dest"
    with pytest.raises(FewstepError, match=r"6 files are missing.*01\.png.* and 1 more"):
        make_shards(dest, table)
    assert not dest.exists()
    assert len(records(make_shards(dest, table, "--skip-missing"))) == 6


def test_files_too_large_for_a_record_are_named_before_anything_is_written(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.index.MAX_MEMBER_BYTES", 2**20)
    put(pictures / "cats" / "large.mp4", bytes(2**20 + 1))
    with pytest.raises(FewstepError, match=r"1 files are larger .* 1 MiB: .*large\.mp4"):
        make_shards(tmp_path / "dest", pictures)
    assert len(records(make_shards(tmp_path / "dest", pictures, "--skip-large"))) == 20


def test_a_wrong_column_is_answered_with_the_right_one(tmp_path: Path, pictures: Path) -> None:
    table = write_csv(pictures / "table.csv", [{"path": "cats/00.png", "caption": "a cat"}])
    with pytest.raises(FewstepError, match=r"no column 'captoin'\. Did you mean 'caption'"):
        make_shards(tmp_path / "dest", table, "--caption-column", "captoin")


def test_a_file_listed_twice_is_refused(tmp_path: Path, pictures: Path) -> None:
    table = write_csv(pictures / "table.csv", [{"path": "cats/00.png"}] * 2)
    with pytest.raises(FewstepError, match=r"1 keys would be used more than once \(cats/00\)"):
        make_shards(tmp_path / "dest", table)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[parquet\]'"):
        make_shards(tmp_path / "dest", put(tmp_path / "table.parquet", b""))


def test_the_digits_are_the_real_ones(tmp_path: Path) -> None:
    dest = make_shards(tmp_path / "dest", "digits")
    train, val = records(dest, "train-*.tar"), records(dest, "val-*.tar")
    assert (len(train), len(val)) == (1617, 180)
    labels = {int(key): int(parts["cls"]) for key, parts in {**train, **val}.items()}
    assert [labels[n] for n in range(1797)] == load_digits().target.tolist()


def test_moving_digits_are_drawn_into_shards(tmp_path: Path) -> None:
    pytest.importorskip("av")
    dest = make_shards(
        tmp_path / "dest", "moving-digits", "--num-clips", "5", "--num-held-out", "2"
    )
    assert len(records(dest, "train-*.tar")) == 5
    found = records(dest, "val-*.tar")
    assert {"mp4", "txt", "cls", "json"} == set(found["val-000001"])


def test_an_unknown_source_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="Did you mean 'moving-digits'"):
        make_shards(tmp_path / "dest", "moving-digit")


# ---------------------------------------------------------------------- index


def test_foreign_shards_get_indexes_once(tmp_path: Path, capsys: Any) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {"a.png": png(number, 5, 7), "a.cls": b"1"})
    main(["index", str(tmp_path), "--workers", "1"])
    assert "3 indexes made, 0 were there, 0 failed" in capsys.readouterr().out
    assert ShardIndex.load(tmp_path / "1.tar.index").shapes is None
    main(["index", str(tmp_path), "--workers", "1", "--shapes"])
    assert "3 indexes made" in capsys.readouterr().out  # those had no shapes
    shapes = ShardIndex.load(tmp_path / "1.tar.index").shapes
    assert shapes is not None
    assert shapes.tolist() == [[5, 7]]
    main(["index", str(tmp_path), "--workers", "1"])
    assert "0 indexes made, 3 were there" in capsys.readouterr().out


def test_damaged_shards_are_named_and_the_others_get_their_indexes(
    tmp_path: Path, capsys: Any
) -> None:
    write_tar(tmp_path / "good.tar", {"a.png": png(1)})
    put(tmp_path / "bad.tar", b"no tar at all")
    with pytest.raises(SystemExit) as failed:
        main(["index", str(tmp_path), "--workers", "1"])
    assert failed.value.code == 1
    assert "bad.tar" in capsys.readouterr().err
    assert (tmp_path / "good.tar.index").exists()


def test_nothing_can_be_written_beside_remote_shards() -> None:
    with pytest.raises(FewstepError, match="not on this machine"):
        main(["index", "https://example.org/a.tar"])


def test_every_subcommand_has_examples_in_its_help(capsys: Any) -> None:
    for command in ("make", "index", "encode", "check"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"\n  fewstep shards {command} " in capsys.readouterr().out
