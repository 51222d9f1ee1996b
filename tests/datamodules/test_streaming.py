"""Shards as a datamodule: what it yields, what it survives and how it resumes."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from safetensors.torch import save
from sklearn.datasets import load_digits

from datamodules import Digits, Shards
from datamodules.fields import Caption, Images, Latents, Tensors
from fewstep.errors import FewstepError

from shard_files import (
    FakeTrainer,
    encoded,
    keys,
    png,
    read,
    shards,
    write_numbered,
    write_tar,
)

KINDS = ("png", "cls")

# ---------------------------------------------------------------------- what it yields


def test_digits_are_the_real_ones_whichever_library_reads_the_shards(tmp_path: Path) -> None:
    data = Digits(str(tmp_path / "digits"))
    data.prepare_data()
    real = load_digits()
    mine = {
        key.partition("/")[2]: (image, int(label))
        for batch in data.reference_batches()
        for key, image, label in zip(
            batch["key"], batch["sample"], batch["cond"]["class_labels"], strict=True
        )
    }
    assert len(mine) == 1617
    for key, (image, label) in mine.items():
        assert label == real.target[int(key)]
        grey = (image[0].numpy() + 1) / 2 * 16
        assert np.abs(grey - real.images[int(key)]).max() <= 0.5 * 16 / 255 + 1e-5
    theirs = wds.WebDataset(
        sorted(map(str, (tmp_path / "digits").glob("train-*.tar"))), shardshuffle=False
    )
    assert {s["__key__"]: int(s["cls"]) for s in theirs} == {k: v for k, (_, v) in mine.items()}


def test_held_out_digits_are_not_trained_on(tmp_path: Path) -> None:
    data = Digits(str(tmp_path / "digits"), batch_size=90)
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    train = {key.partition("/")[2] for key in keys(list(data.reference_batches()))}
    held_out = set(keys(read(data)))
    assert (len(train), len(held_out), len(train & held_out)) == (1617, 180, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_latents_captions_and_embeddings_come_from_the_keys_that_are_configured(
    tmp_path: Path, num_workers: int
) -> None:
    members = {}
    for number in range(6):
        members[f"{number}.vae.npy"] = npy(np.full((4, 2, 2), number, dtype=np.float16))
        members[f"{number}.meta.json"] = json.dumps({"blip": f"caption {number}"}).encode()
        members[f"{number}.t5.safetensors"] = save(
            {"e": torch.full((3, 2), float(number)), "m": torch.ones(3)}
        )
    write_tar(tmp_path / "a.tar", members)
    data = shards(
        tmp_path,
        batch_size=6,
        sample=Latents(scale=2.0, keys=["vae.npy"]),
        conditions={
            "prompt": Caption("blip", keys=["meta.json"]),
            "text": Tensors({"e": "encoder_hidden_states", "m": "mask"}, keys=["t5.safetensors"]),
        },
        num_workers=num_workers,
    )
    (batch,) = read(data)
    order = [int(key) for key in batch["key"]]
    assert sorted(order) == list(range(6))
    assert batch["sample"].shape == (6, 4, 2, 2)
    assert batch["sample"][:, 0, 0, 0].tolist() == [2.0 * n for n in order]
    assert batch["prompt"] == [f"caption {n}" for n in order]
    assert batch["cond"].keys() == {"encoder_hidden_states", "mask"}
    assert batch["cond"]["encoder_hidden_states"][:, 0, 0].tolist() == order


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_say_where_each_crop_lies(tmp_path: Path, num_workers: int) -> None:
    members = {}
    for number in range(6):
        # Every pixel tells its own column.
        columns = np.arange(20 + number, dtype=np.uint8)[None, :, None]
        pixels = np.broadcast_to(columns, (10, 20 + number, 3))
        members[f"{number}.png"] = encoded(np.ascontiguousarray(pixels))
    write_tar(tmp_path / "0.tar", members)
    data = shards(
        tmp_path,
        sample=Images(size=10, channels=1, crop="random", time_ids=True),
        conditions={},
        batch_size=6,
        num_workers=num_workers,
    )
    (batch,) = read(data, "train", 1)
    told = batch["cond"]["time_ids"]
    assert told.shape == (6, 6)
    assert told[:, 1].tolist() == [20 + int(key) for key in batch["key"]]
    first = (batch["sample"][:, 0, 0, 0] + 1) * 127.5
    assert (told[:, 3] - first).abs().max() <= 1
    assert len(set(told[:, 3].tolist())) > 1
    assert data.reference_conditions(range(2)).cond == {}


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_batches_are_made_of_one_aspect(tmp_path: Path) -> None:
    """Each image shows its own aspect, so a wrong bucket would be seen."""
    draws = np.random.default_rng(0)
    for shard in range(4):
        members = {}
        for number in range(60):
            shape = [(16, 32), (24, 24), (32, 16)][draws.integers(3)]
            members[f"{shard}-{number}.png"] = encoded(np.zeros((*shape, 3), np.uint8))
            members[f"{shard}-{number}.shape"] = str(shape).encode()
        write_tar(tmp_path / f"{shard}.tar", members)
    sizes = [(8, 16), (12, 12), (16, 8)]
    data = shards(
        tmp_path, sample=Images(buckets=sizes), conditions={}, batch_size=8, remainder="drop"
    )
    batches = read(data, "train")
    assert len(batches) == 30
    assert len(set(keys(batches))) == 240
    found = [tuple(batch["sample"].shape[2:]) for batch in batches]
    assert set(found) == set(sizes)
    stored = _shapes_by_key(tmp_path)
    fitting = sum(
        stored[key] == (2 * batch["sample"].shape[2], 2 * batch["sample"].shape[3])
        for batch in batches
        for key in batch["key"]
    )
    assert fitting >= 225


def _shapes_by_key(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                if extension == "shape":
                    text = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
                    found[stem] = tuple(json.loads(text.replace("(", "[").replace(")", "]")))
    return found  # type: ignore[return-value]


def test_augmentations_depend_on_record_and_epoch_only(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    write_tar(folder / "part-000.tar", {f"{n}.png": encoded(noise) for n in range(5)})
    (folder / "part-001.tar").unlink()
    options: dict[str, Any] = {
        "sample": Images(size=4, crop="random", min_scale=0.2, flip=True),
        "conditions": {},
    }

    def seen(batches: list[Any]) -> dict[str, Any]:
        return {k: x for b in batches for k, x in zip(b["key"], b["sample"], strict=True)}

    first = seen(read(shards(folder, **options), "train", 1))
    again = seen(read(shards(folder, batch_size=1, num_workers=2, **options), "train", 5))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    later = seen(read(shards(folder, FakeTrainer(global_step=1), **options), "train", 1))
    assert not any(torch.equal(first[key], later[key]) for key in first)
    fixed = seen(read(shards(folder, **options)))
    assert torch.equal(fixed["0"], fixed["1"])


# ---------------------------------------------------------------------- what it survives


def damage(folder: Path, *names: str) -> None:
    """Cuts the images of these records short."""
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name in names:
            if f"{name}.png" in members:
                members[f"{name}.png"] = members[f"{name}.png"][:40]
        write_tar(shard, members)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_record_is_skipped_counted_and_named(folder: Path, num_workers: int) -> None:
    damage(folder, "1-0003")
    data = shards(folder, num_workers=num_workers)
    with pytest.warns(
        UserWarning, match=r"damaged record: part-001\.tar/1-0003: it is no PNG.*truncated"
    ):
        batches = read(data)
    assert sorted(len(b["key"]) for b in batches) == [4, 5]
    assert len(set(keys(batches))) == 9
    assert list(data.damage.records) == ["part-001.tar/1-0003"]
    assert all(b.keys() == {"sample", "cond", "key"} for b in batches)
    assert all(len(b["sample"]) == len(b["key"]) for b in batches)


def test_too_many_damaged_records_stop_the_run(folder: Path) -> None:
    damage(folder, "1-0003", "0-0001")
    data = shards(folder, max_damaged=1)
    with (
        pytest.raises(FewstepError, match=r"2 damaged records are more than max_damaged: 1 \(last"),
        pytest.warns(UserWarning, match="damaged record"),
    ):
        read(data)


def test_a_batch_of_damaged_records_only_gets_the_next_good_one(folder: Path) -> None:
    """Every rank must take its step: none may find its batch empty."""
    damage(folder, "0-0002", "0-0003")
    with pytest.warns(UserWarning, match="damaged record"):
        batches = read(shards(folder, batch_size=1))
    assert len(batches) == 10
    assert keys(batches).count("0-0004") == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_without_any_good_record_is_one_clear_error(folder: Path, num_workers: int) -> None:
    damage(folder, *(f"0-000{n}" for n in range(5)))
    with pytest.raises(FewstepError) as caught:
        read(shards(folder, num_workers=num_workers))
    assert "No record of the shard" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_changed_after_indexing_is_one_clear_error(
    folder: Path, num_workers: int
) -> None:
    data = shards(folder, num_workers=num_workers)
    (folder / "part-000.tar").write_bytes((folder / "part-001.tar").read_bytes())
    with pytest.raises(FewstepError, match=r"has changed since it was indexed.*shards index"):
        read(data)


def test_a_pickle_in_a_shard_is_never_loaded(tmp_path: Path) -> None:
    proof = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    poison = pickle.dumps(Payload())
    objects = io.BytesIO()
    np.save(objects, np.array([Payload()], dtype=object), allow_pickle=True)
    hostile = {"a.png": png(1), "a.cls": b"0"}
    hostile |= {f"a.{e}": poison for e in ("pyd", "pkl", "pickle", "pth", "pt", "json", "txt")}
    hostile |= {"b.png": poison, "b.cls": poison, "c.png": png(2), "c.cls": poison}
    hostile |= {f"{k}.latent.npy": objects.getvalue() for k in "abc"}
    hostile |= {f"{k}.latent.safetensors": poison for k in "abc"}
    ordered = dict(sorted(hostile.items()))
    write_tar(tmp_path / "shards" / "hostile.tar", ordered)
    for sample in (Images(channels=1), Latents(), Latents(keys=["latent.npy"])):
        data = shards(tmp_path / "shards", sample=sample)
        if isinstance(sample, Images):
            with pytest.warns(UserWarning, match="damaged record"):
                assert keys(read(data)) == ["a"]
        else:
            with pytest.raises(FewstepError, match="No record of the shard"):
                read(data)
    assert not proof.exists()
    pickle.loads(poison)
    assert proof.exists(), "the payload is harmless, so this test proves nothing"


def test_a_record_without_the_configured_part_is_damaged(folder: Path) -> None:
    write_tar(
        folder / "part-002.tar", {"x.png": png(1), "y.cls": b"1", "z.png": png(1), "z.cls": b"1"}
    )
    with pytest.warns(UserWarning, match="Skipped") as caught:
        read(shards(folder))
    messages = {str(warning.message) for warning in caught}
    assert "Skipped a damaged record: part-002.tar/x: it has no cls, only png" in messages
    assert any("part-002.tar/y: it has no jpg or jpeg or png" in m for m in messages)


# ---------------------------------------------------------------------- how it resumes


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("remainder", ["carry", "share", "drop"])
def test_training_resumes_at_the_next_record_whatever_was_prefetched(
    tmp_path: Path, num_workers: int, remainder: str
) -> None:
    folder = write_numbered(tmp_path, [5, 9, 4])
    options = {"num_workers": num_workers, "remainder": remainder, "batch_size": 4}
    limit = 9 if remainder == "carry" else None
    whole = [b["key"] for b in read(shards(folder, **options), "train", limit)]
    assert len(whole) == {"carry": 9, "share": 5, "drop": 4}[remainder]
    interrupted = shards(folder, **options)
    read(interrupted, "train", 3)
    interrupted.trainer.global_step = 3  # type: ignore[union-attr]
    resumed = shards(folder, **options)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    resumed.trainer.global_step = 3  # type: ignore[union-attr]
    rest = read(resumed, "train", 6 if remainder == "carry" else None)
    assert [b["key"] for b in rest] == whole[3:]


def test_a_run_goes_on_with_other_ranks_workers_and_batches(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path, [12, 9, 14, 10])
    seen: list[str] = []
    for rank in range(2):
        seen += keys(read(shards(folder, FakeTrainer(rank, 2), num_workers=2), "train", 2))
    saved = shards(folder, FakeTrainer(0, 2, global_step=2), num_workers=2).state_dict()
    for rank in range(5):
        data = shards(folder, FakeTrainer(rank, 5), batch_size=1, num_workers=1)
        data.load_state_dict(saved)
        data.trainer.global_step = 2  # type: ignore[union-attr]
        assert data.position().offset == 20
        seen += keys(read(data, "train", 5))
    assert len(seen) == 45
    assert len(set(seen)) == 45


def test_another_seed_or_other_shards_cannot_be_continued_silently(folder: Path) -> None:
    state = shards(folder, FakeTrainer(global_step=1), seed=1).state_dict()
    with pytest.raises(FewstepError, match=r"other seed.*data\.init_args\.seed: 1"):
        shards(folder, seed=2).load_state_dict(state)
    write_numbered(folder, [5, 6])
    with pytest.raises(FewstepError, match=r"other shards.*restart_stream: true"):
        shards(folder, seed=1).load_state_dict(state)
    write_numbered(folder, [5, 5])
    shards(folder, seed=1).load_state_dict(state)
    members = {f"1-{n:04d}.{e}": png(99) if e == "png" else b"7" for n in range(5) for e in KINDS}
    os.utime(write_tar(folder / "part-001.tar", members), (0, 0))
    with pytest.raises(FewstepError, match=r"other contents of them.*restart_stream: true"):
        shards(folder, seed=1).load_state_dict(state)
    write_numbered(folder, [5, 6])
    restarted = shards(folder, FakeTrainer(global_step=1), seed=1, restart_stream=True)
    restarted.load_state_dict(state)
    assert restarted.position().offset == 0


def test_all_ranks_validate_equally_many_batches_and_every_record_once(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path, [8, 3, 6])
    parts = [read(shards(folder, FakeTrainer(rank, 3), batch_size=2)) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    seen = [key for part in parts for key in keys(part)]
    assert len(seen) == len(set(seen)) == 17


def test_all_ranks_validate_in_step_however_few_records_there_are(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path, [2, 1])
    parts = [read(shards(folder, FakeTrainer(rank, 8), batch_size=1)) for rank in range(8)]
    assert [len(part) for part in parts] == [1] * 8
    assert set(keys(parts[0] + parts[1] + parts[2])) == {"0-0000", "0-0001", "1-0000"}
    loader = shards(folder, FakeTrainer(7, 8), batch_size=1).val_dataloader()
    assert len(loader) == 1


def test_the_reference_is_described_by_what_was_read(folder: Path) -> None:
    data: Shards = shards(folder)
    protocol = data.reference_protocol()
    assert protocol["records"] == 10
    assert protocol["sample"]["field"] == "Images"
    write_numbered(folder, [5, 6])
    assert shards(folder).reference_protocol()["records_sha256"] != protocol["records_sha256"]
    json.dumps(protocol)


def labels_by_key(data: Shards) -> dict[str, int]:
    return {
        key: int(label)
        for batch in data.reference_batches()
        for key, label in zip(batch["key"], batch["cond"]["class_labels"], strict=True)
    }


def test_ranks_share_the_reference(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path, [8, 3, 6])
    parts = [keys(list(shards(folder, batch_size=2).reference_batches(r, 3))) for r in range(3)]
    seen = [key for part in parts for key in part]
    assert len(seen) == len(set(seen)) == 17


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_a_reference_of_fewer_records_than_ranks(
    tmp_path: Path, num_workers: int
) -> None:
    folder = write_numbered(tmp_path, [2, 1])
    data = shards(folder, batch_size=1, num_workers=num_workers)
    parts = [list(data.reference_batches(rank, 8)) for rank in range(8)]
    assert sorted(len(part) for part in parts) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert len({key for part in parts for key in keys(part)}) == 3


@pytest.mark.parametrize("folders", [["a"], ["a", "b"]])
def test_no_two_reference_records_have_one_key(tmp_path: Path, folders: list[str]) -> None:
    """In many data sets the keys begin anew in every shard, or the shards in every folder."""
    members = {f"{n:04d}.{e}": png(n) if e == "png" else b"1" for n in range(5) for e in KINDS}
    for folder in folders:
        for shard in range(3):
            write_tar(tmp_path / folder / f"{shard}.tar", members)
    data = shards(
        tmp_path, shards=[str(tmp_path / f) for f in folders], val_shards=str(tmp_path / "a")
    )
    found = keys(list(data.reference_batches()))
    assert len(found) == len(set(found)) == 15 * len(folders)
    assert found[0].endswith("0.tar/0000")
    assert set(keys(read(data, "train", 3))) == {f"{n:04d}" for n in range(5)}


def test_lending_conditions_again_and_again_opens_no_more_files(tmp_path: Path) -> None:
    data = shards(write_numbered(tmp_path, [3] * 8))

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    data.reference_conditions(range(24))
    before = open_files()
    for _ in range(50):
        data.reference_conditions(range(24))
    assert open_files() == before
    reader = data._lending.reader  # type: ignore[union-attr]
    reader.close()
    assert open_files() == before - 8
    assert len(data.reference_conditions(range(24)).cond["class_labels"]) == 24
    del reader, data
    gc.collect()
    assert open_files() == before - 8


def test_samples_get_the_conditions_of_records_from_all_over_the_shards(tmp_path: Path) -> None:
    data = Digits(str(tmp_path / "digits"))
    data.prepare_data()
    everyone = sorted(labels_by_key(data).values())
    lent = data.reference_conditions(range(1617)).cond["class_labels"]
    assert sorted(lent.tolist()) == everyone  # each record lends its condition once
    assert torch.equal(data.reference_conditions([5, 1620]).cond["class_labels"], lent[[5, 3]])
    assert set(lent[:40].tolist()) == set(range(10))


def test_a_damaged_record_lends_no_condition(tmp_path: Path) -> None:
    members = {f"{n}.png": png(n) for n in range(4)} | {f"{n}.txt": b"text" for n in range(4)}
    members["2.txt"] = b"\xff\xfe"  # not UTF-8
    write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    data = shards(tmp_path, conditions={"prompt": Caption()})
    assert data.reference_conditions(range(4)).prompt == ["text"] * 4


def test_data_without_conditions_lends_none(folder: Path) -> None:
    lent = shards(folder, conditions={}).reference_conditions(range(3))
    assert lent == ({}, None)
