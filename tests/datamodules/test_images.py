"""Images from shards: what is read, what is refused, what is skipped and how it resumes."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import Digits, ImageShards
from datamodules.shards import ShardIndex, expand_shards
from fewstep.errors import FewstepError


def png(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), value, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of five images each; one image is damaged."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(5):
            key = f"{shard}{number}"
            members[f"{key}.png"] = png(10 * number)
            members[f"{key}.cls"] = str(number).encode()
        if shard == 1:
            members["13.png"] = members["13.png"][:40]
        write_tar(tmp_path / f"part-{shard}.tar", members)
    return tmp_path


class FakeTrainer:
    def __init__(self) -> None:
        self.global_step = self.global_rank = 0
        self.world_size = 1


def module(folder: Path, **options: Any) -> ImageShards:
    pattern = str(folder / "part-{0..1}.tar")
    data = ImageShards(pattern, pattern, batch_size=5, channels=1, **options)
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    data.setup()
    return data


def test_digits_are_the_real_ones_whichever_library_reads_the_shards(tmp_path: Path) -> None:
    data = Digits(str(tmp_path / "digits"))
    data.prepare_data()
    real = load_digits()
    mine = {
        key: (image, int(label))
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
    read = {sample["__key__"]: int(sample["cls"]) for sample in theirs}
    assert read == {key: label for key, (_, label) in mine.items()}


def test_held_out_digits_are_not_trained_on(tmp_path: Path) -> None:
    data = Digits(str(tmp_path / "digits"))
    data.prepare_data()
    data.setup()
    train, held_out = ({r.key for r in i.records} for i in (data.train_index, data.val_index))
    assert len(train | held_out) == 1797
    assert not train & held_out


def test_a_damaged_image_is_skipped_counted_and_named(folder: Path) -> None:
    data = module(folder)
    with pytest.warns(UserWarning, match=r"damaged record: part-1\.tar/13"):
        batches = [data.on_before_batch_transfer(b, 0) for b in data.val_dataloader()]
    assert [len(b["sample"]) for b in batches] == [5, 4]
    assert "13" not in [key for batch in batches for key in batch["key"]]
    assert len(data.damaged) == 1
    assert all("skipped" not in batch for batch in batches)


def test_too_many_damaged_records_stop_the_run(folder: Path) -> None:
    data = module(folder, max_damaged=0)
    with (
        pytest.raises(FewstepError, match="more than max_damaged: 0"),
        pytest.warns(UserWarning, match="damaged record"),
    ):
        [data.on_before_batch_transfer(b, 0) for b in data.val_dataloader()]


def test_a_missing_folder_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"the folder '.*nowhere' does not exist. Set data"):
        expand_shards(str(tmp_path / "nowhere" / "*.tar"))
    with pytest.raises(FewstepError, match="exists but holds none"):
        expand_shards(str(tmp_path / "*.tar"))


def test_a_shell_command_is_refused() -> None:
    with pytest.raises(FewstepError, match="would run a shell command"):
        expand_shards("pipe:touch /tmp/never")


def test_a_pickle_in_a_shard_is_never_loaded(tmp_path: Path) -> None:
    proof = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    poison = pickle.dumps(Payload())
    write_tar(
        tmp_path / "part-0.tar",
        {"a.png": png(1), "a.cls": b"0", "a.pyd": poison, "b.pkl": poison, "b.cls": poison},
    )
    write_tar(tmp_path / "part-1.tar", {"c.png": png(1), "c.cls": b"1"})
    data = module(tmp_path)
    with pytest.warns(UserWarning, match="damaged record"):
        batches = [data.on_before_batch_transfer(b, 0) for b in data.val_dataloader()]
    assert [key for batch in batches for key in batch["key"]] == ["a", "c"]
    assert not proof.exists()


def test_links_and_compressed_shards_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("b.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    index = ShardIndex.of([str(tmp_path / "links.tar")])
    assert [record.key for record in index.records] == ["b"]
    with tarfile.open(tmp_path / "inflating.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(FewstepError, match=r"inflating\.tar"):
        ShardIndex.of([str(tmp_path / "inflating.tar")])


def test_a_truncated_shard_is_named(folder: Path) -> None:
    whole = (folder / "part-0.tar").read_bytes()
    (folder / "part-0.tar").write_bytes(whole[:700])
    with pytest.raises(FewstepError, match=r"part-0\.tar"):
        ShardIndex.of([str(folder / "part-0.tar")])


def test_large_images_are_resized_and_cropped_to_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((16, 48), dtype=np.uint8)
    wide[:, 16:32] = 255
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, format="PNG")
    for number in range(2):
        write_tar(tmp_path / f"part-{number}.tar", {"a.png": buffer.getvalue(), "a.cls": b"3"})
    (batch,) = list(module(tmp_path, image_size=8).val_dataloader())
    assert batch["sample"].shape == (2, 1, 8, 8)
    assert float(batch["sample"].mean()) > 0.85


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumes_at_the_next_record_whatever_was_prefetched(
    folder: Path, num_workers: int
) -> None:
    (folder / "part-1.tar").write_bytes((folder / "part-0.tar").read_bytes())

    def keys(data: ImageShards, count: int) -> list[list[str]]:
        stream = iter(data.train_dataloader())
        found = [next(stream)["key"] for _ in range(count)]
        del stream
        return found

    whole = keys(module(folder, num_workers=num_workers), 9)
    interrupted = module(folder, num_workers=num_workers)
    keys(interrupted, 4)
    interrupted.trainer.global_step = 4  # type: ignore[union-attr]
    state = interrupted.state_dict()
    resumed = module(folder, num_workers=num_workers)
    resumed.load_state_dict(state)
    resumed.trainer.global_step = 4  # type: ignore[union-attr]
    assert keys(resumed, 5) == whole[4:]


def test_the_position_survives_a_change_of_batch_size(folder: Path) -> None:
    data = module(folder)
    data.trainer.global_step = 6  # type: ignore[union-attr]
    resumed = module(folder)
    resumed.batch_size = 3
    resumed.trainer.global_step = 6  # type: ignore[union-attr]
    resumed.load_state_dict(data.state_dict())
    assert resumed.consumed == 30
    resumed.trainer.global_step = 7  # type: ignore[union-attr]
    assert resumed.consumed == 33


def test_another_seed_cannot_resume_the_stream(folder: Path) -> None:
    state = module(folder, seed=1).state_dict()
    with pytest.raises(FewstepError, match=r"set data\.init_args\.seed: 1 to resume"):
        module(folder, seed=2).load_state_dict(state)


def test_pixels_are_between_minus_one_and_one(folder: Path) -> None:
    batch = next(iter(module(folder).val_dataloader()))
    assert batch["sample"].dtype == torch.float32
    assert float(batch["sample"].min()) == -1
    assert float(batch["sample"].max()) <= 1
