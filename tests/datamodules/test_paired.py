"""Videos with pictures beside them: two streams, each as exact as alone, in one batch."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import MovingDigits, VideosWithImages
from datamodules.fields import Images
from fewstep.errors import FewstepError

from shard_files import FakeTrainer, keys, shards, write_numbered, write_tar


def paired(
    folder: Path,
    trainer: FakeTrainer | None = None,
    videos: int = 2,
    images: int = 4,
    reference: Any = "videos",
    **options: Any,
) -> VideosWithImages:
    data = VideosWithImages(
        shards(
            folder / "clips", batch_size=videos, sample=Images(channels=1, as_video=True), **options
        ),
        shards(
            folder / "pictures", batch_size=images, sample=Images(size=4, channels=1), **options
        ),
        reference,
    )
    data.trainer = trainer or FakeTrainer()  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    return data


def ready(data: VideosWithImages, batches: Iterable[Any]) -> list[Any]:
    found = (data.on_before_batch_transfer(batch, 0) for batch in batches)
    return [data.on_after_batch_transfer(batch, 0) for batch in found]


def read(data: VideosWithImages, batches: int) -> list[Any]:
    return ready(data, islice(data.train_dataloader(), batches))


def names(batches: Iterable[Any]) -> list[tuple[list[str], list[str]]]:
    return [(batch["key"], batch["images"]["key"]) for batch in batches]


def cut_short(shard: Path, *records: str) -> None:
    """Leaves so little of some pictures that they cannot be decoded."""
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    for record in records:
        members[f"{record}.png"] = members[f"{record}.png"][:40]
    write_tar(shard, members)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbered(tmp_path / "clips", [7, 6])
    write_numbered(tmp_path / "pictures", [9, 8, 5])
    return tmp_path


def test_a_batch_of_videos_holds_a_batch_of_pictures_of_their_own_size(folder: Path) -> None:
    for batch in read(paired(folder), 8):
        assert batch["sample"].shape == (2, 1, 1, 8, 8)
        pictures = batch["images"]
        assert pictures["sample"].shape == (4, 1, 4, 4)
        for sample in (batch["sample"], pictures["sample"]):
            assert sample.dtype == torch.float32
            assert float(sample.min()) >= -1
        numbers = [int(key[2:]) for key in pictures["key"]]
        assert pictures["cond"]["class_labels"].tolist() == numbers
        assert ((pictures["sample"][:, 0, 0, 0] + 1) * 127.5).round().tolist() == numbers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_set_comes_in_the_order_it_has_alone(folder: Path, num_workers: int) -> None:
    data = paired(folder, num_workers=num_workers)
    together = names(read(data, 20))
    for which, source in enumerate((data.videos, data.images)):
        alone = [batch["key"] for batch in islice(source.train_dataloader(), 20)]
        assert [pair[which] for pair in together] == alone


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_sets_resume_exactly(folder: Path, num_workers: int) -> None:
    whole = names(read(paired(folder, num_workers=num_workers), 21))
    interrupted = paired(folder, num_workers=num_workers)
    read(interrupted, 12)  # some of which were only prefetched
    interrupted.trainer.global_step = 9  # type: ignore[union-attr]
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = paired(folder, num_workers=num_workers)
    resumed.load_state_dict(state)
    resumed.trainer.global_step = 9  # type: ignore[union-attr]
    assert names(read(resumed, 12)) == whole[9:]
    assert resumed.videos.position().offset == 9 * 2 - 13
    assert resumed.images.position().offset == 9 * 4 - 22


def test_a_run_goes_on_with_other_ranks_and_more_pictures_a_video(folder: Path) -> None:
    one = paired(folder, FakeTrainer(global_step=2))
    before = read(paired(folder), 2)
    state = one.state_dict()
    after = []
    for rank in range(2):
        data = paired(folder, FakeTrainer(rank, 2), images=6)
        data.load_state_dict(state)
        data.trainer.global_step = 2  # type: ignore[union-attr]
        after += read(data, 1)
    videos = keys(before + after)
    pictures = keys([batch["images"] for batch in before + after])
    assert len(videos) == len(set(videos)) == 2 * 2 + 2 * 2
    assert len(pictures) == len(set(pictures)) == 2 * 4 + 2 * 6


def test_ranks_read_different_videos_and_different_pictures(folder: Path) -> None:
    parts = [read(paired(folder, FakeTrainer(rank, 2)), 2) for rank in range(2)]
    for which in (lambda batch: batch, lambda batch: batch["images"]):
        found = [set(keys([which(batch) for batch in part])) for part in parts]
        assert not found[0] & found[1]
        assert len(found[0] | found[1]) == sum(len(which(b)["key"]) for p in parts for b in p)


# ---------------------------------------------------------------------- damage


def test_the_first_pictures_of_a_batch_stand_in_for_damaged_ones(folder: Path) -> None:
    cut_short(folder / "pictures" / "part-001.tar", "1-0003")
    data = paired(folder, videos=2, images=22)  # all pictures in one batch
    with pytest.warns(UserWarning, match="damaged record: .*1-0003"):
        (batch,) = read(data, 1)
    assert len(batch["sample"]) == 2
    found = batch["images"]
    assert len(found["sample"]) == len(found["key"]) == len(found["cond"]["class_labels"]) == 22
    assert found["key"][-1] == found["key"][0]
    assert torch.equal(found["sample"][-1], found["sample"][0])
    assert len(set(found["key"])) == 21
    assert list(data.images.damage.records) == ["part-001.tar/1-0003"]
    assert not data.videos.damage.records


def test_pictures_of_missing_videos_are_missing_too(folder: Path) -> None:
    cut_short(folder / "clips" / "part-000.tar", "0-0002", "0-0005")
    data = paired(folder, videos=13, images=39)
    whole = names(islice(paired(folder, videos=13, images=39).train_dataloader(), 1))
    with pytest.warns(UserWarning, match="damaged record"):
        (batch,) = read(data, 1)
    assert len(batch["sample"]) == 11
    assert batch["images"]["key"] == whole[0][1][:33]
    assert sorted(data.videos.damage.records) == ["part-000.tar/0-0002", "part-000.tar/0-0005"]
    assert batch.keys() == {"sample", "cond", "key", "images"}
    assert batch["images"].keys() == {"sample", "cond", "key"}


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_pictures_go_with_all_held_out_videos_in_equally_many_batches(
    folder: Path, world: int
) -> None:
    parts = []
    for rank in range(world):
        loader = paired(folder, FakeTrainer(rank, world)).val_dataloader()
        parts.append(list(loader))
        assert len(loader) == len(parts[-1])  # type: ignore[arg-type]
        assert names(loader) == names(parts[-1])  # the same at every validation
    assert len({len(part) for part in parts}) == 1
    everything = [batch for part in parts for batch in part]
    assert sorted(Counter(keys(everything)).values()) == [1] * 13
    assert all(len(b["images"]["key"]) == 2 * len(b["key"]) for b in everything)
    counts = Counter(keys([batch["images"] for batch in everything]))
    assert sum(counts.values()) == 26
    assert len(counts) == 22  # each at least once, though ranks have not all equally many
    assert max(counts.values()) <= 2


def test_the_rest_of_many_pictures_is_left_out_of_validation(folder: Path) -> None:
    found = keys([b["images"] for b in paired(folder, videos=2, images=2).val_dataloader()])
    assert found == [f"{s}-{n:04d}" for s, size in ((0, 9), (1, 8)) for n in range(size)][:13]


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize(("reference", "records"), [("videos", 13), ("images", 22)])
def test_either_set_can_be_the_reference(folder: Path, reference: str, records: int) -> None:
    data = paired(folder, reference=reference)
    assert data.reference_protocol()["records"] == records
    batches = list(data.reference_batches())
    assert sum(len(batch["key"]) for batch in batches) == records
    assert all("images" not in batch for batch in batches)
    assert len(data.reference_conditions(range(3)).cond["class_labels"]) == 3


def test_moving_digits_come_with_crisp_pictures(tmp_path: Path) -> None:
    sets = [
        MovingDigits(str(tmp_path), kind, num_clips=8, num_held_out=4, batch_size=size)  # type: ignore[arg-type]
        for kind, size in (("watermarked", 2), ("crisp", 4))
    ]
    data = VideosWithImages(*sets)
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    for batch in [*read(data, 2), *ready(data, data.val_dataloader())]:
        assert batch["sample"].shape == (2, 1, 16, 32, 32)
        assert batch["images"]["sample"].shape == (4, 1, 32, 32)
        assert [len(batch["prompt"]), len(batch["images"]["prompt"])] == [2, 4]
        assert all("moving" not in prompt for prompt in batch["images"]["prompt"])


@pytest.mark.parametrize(
    ("videos", "images", "remedy"),
    [(4, 14, "Set it to 12, for 3"), (4, 2, "Set it to 4, for 1")],
)
def test_batch_sizes_that_do_not_go_together_say_what_to_set(
    folder: Path, videos: int, images: int, remedy: str
) -> None:
    with pytest.raises(FewstepError, match=f"batch_size: {images}.*videos' {videos}.*{remedy}"):
        paired(folder, videos=videos, images=images)


def test_streams_that_end_and_unknown_references_are_an_error(folder: Path) -> None:
    with pytest.raises(FewstepError, match=r"remainder: carry in \['videos', 'images'\]"):
        paired(folder, remainder="drop")
    with pytest.raises(FewstepError, match="reference must be one of"):
        paired(folder, reference="pictures")
