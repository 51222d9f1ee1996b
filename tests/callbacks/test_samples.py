"""What the sample logger draws: grids, clips, strips and prompts, and where they go."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import Samples
from callbacks.clips import MOST_FRAMES, clip, encode, strip
from callbacks.pictures import as_pixels, picture
from fewstep.contracts import Conditions


class Sampler(pl.LightningModule):
    """Makes samples that tell their noise, condition and the size of their batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.sample_shape = shape
        self.batches: list[int] = []
        self.seen: list[Tensor] = []
        self.seeds: list[int] = []
        self.prompts: list[str] = []

    def sample(
        self, noise: Tensor, cond: Any, steps: int, generator: Any, role: str, prompt: Any
    ) -> Tensor:
        self.batches.append(len(noise))
        self.seeds += [g.initial_seed() for g in generator]
        self.prompts += prompt or []
        self.seen.append(next(iter(cond.values())) if cond else torch.empty(0))
        return noise

    def decode(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1)

    def sampling_roles(self) -> list[str]:
        return ["ema"]

    def step_counts(self, role: str | None = None) -> list[int]:
        return [4]


class Data:
    """Conditions of samples by their numbers; the most that were asked for are counted."""

    def __init__(self, cond: bool = False, prompts: bool = False) -> None:
        self.cond, self.prompts, self.asked = cond, prompts, 0

    def reference_conditions(self, numbers: Sequence[int]) -> Conditions:
        self.asked = max(self.asked, len(numbers))
        labels = {"class_labels": torch.tensor([2 - n % 3 for n in numbers])} if self.cond else {}
        prompts = [f"fox\n{n}" for n in numbers] if self.prompts else None
        return Conditions(labels, prompts)


def trainer_of(tmp_path: Path, data: Data, loggers: Any = ()) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu", logger=list(loggers) or False, default_root_dir=tmp_path, max_steps=1
    )
    trainer.datamodule = data  # type: ignore[attr-defined]
    return trainer


def drawn(tmp_path: Path, shape: tuple[int, ...], data: Data | None = None, **more: Any) -> Sampler:
    """Draws once after 7 updates."""
    loggers = more.pop("loggers", ())
    module = Sampler(*shape)
    Samples(**more).draw(trainer_of(tmp_path, data or Data(), loggers), module, 7)
    return module


def open_all(path: Path) -> list[np.ndarray[Any, Any]]:
    with Image.open(path) as image:
        frames = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.array(image.convert("RGB")))
    return frames


# ---------------------------------------------------------------------- videos


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_videos_become_a_clip_and_a_strip_of_the_first_rows_frames(
    tmp_path: Path, kind: str
) -> None:
    drawn(tmp_path, (3, 5, 8, 8), count=6, columns=3, clip_format=kind, fps=10)
    folder = tmp_path / "samples"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["00000007_ema_4_steps.png", f"00000007_ema_4_steps.{kind}"]
    )
    frames = open_all(folder / f"00000007_ema_4_steps.{kind}")
    assert len(frames) == 5
    assert frames[0].shape == (2 * 9 + 1, 3 * 9 + 1, 3)
    with Image.open(folder / f"00000007_ema_4_steps.{kind}") as image:
        image.seek(1)
        image.load()
        assert (image.info["duration"], image.info["loop"]) == (100, 0)
    (still,) = open_all(folder / "00000007_ema_4_steps.png")
    assert still.shape == (3 * 9 + 1, 5 * 9 + 1, 3)


def test_every_frame_of_a_clip_shows_that_frame_of_every_video() -> None:
    videos = torch.full((4, 1, 3, 6, 6), -1.0)
    videos[2, :, 1] = 1.0
    frames = clip(videos, columns=2)
    assert frames.shape == (3, 3, 15, 15)
    assert int(frames[0, 0, 10, 3]) == 0
    assert int(frames[1, 0, 10, 3]) == 255, "the third video is below the first"
    assert int(frames[1, 0, 3, 3]) == 0


def test_a_strip_runs_through_time_from_left_to_right_and_thins_long_clips() -> None:
    ramp = torch.linspace(-1, 1, 41).view(1, 1, 41, 1, 1).expand(2, 3, 41, 4, 4)
    image = strip(ramp, columns=1)
    assert image.shape == (3, 6, 5 * MOST_FRAMES + 1)
    shown = image[0, 3, 2::5]
    assert (int(shown[0]), int(shown[-1])) == (0, 255)
    assert bool((shown[1:] > shown[:-1]).all())


def test_an_animation_keeps_its_colours() -> None:
    frames = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    frames[0, 0], frames[1, 1] = 250, 250
    for kind in ("webp", "gif"):
        with Image.open(io.BytesIO(encode(frames, 8, kind))) as image:  # type: ignore[arg-type]
            for i, wanted in enumerate(((250, 0, 0), (0, 250, 0))):
                image.seek(i)
                found = np.array(image.convert("RGB"))[8, 8].astype(int)
                assert np.abs(found - wanted).max() < 12


# ---------------------------------------------------------------------- sizes


def test_grids_wider_than_asked_for_are_made_smaller(tmp_path: Path) -> None:
    drawn(tmp_path, (3, 64, 128), count=4, columns=2, max_picture_width=130)
    (image,) = open_all(tmp_path / "samples" / "00000007_ema_4_steps.png")
    assert image.shape == (2 * (32 + 1) + 1, 2 * (63 + 1) + 1, 3)


def test_making_smaller_averages_instead_of_skipping_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    grain = torch.randn(1, 3, 64, 64, generator=generator).sign()
    small = as_pixels(grain, columns=1, max_width=18).float() / 127.5 - 1
    assert small.shape[-1] == 16
    assert small.std() < 0.25, "skipping pixels leaves 0.5 of a deviation of 1"


def test_small_pictures_stay_as_they_are_to_the_pixel() -> None:
    images = torch.rand(6, 3, 8, 8) * 2 - 1
    grid = picture(images, columns=3, max_width=2048)
    assert torch.equal(grid[:, 1:9, 1:9], ((images[0] + 1) * 127.5).round().to(torch.uint8))


def test_large_pictures_are_sampled_a_few_at_a_time(tmp_path: Path) -> None:
    module = drawn(tmp_path, (3, 8, 8), Data(cond=True), count=10, columns=5, batch_size=4)
    assert module.batches == [4, 4, 2]
    whole = drawn(tmp_path / "whole", (3, 8, 8), Data(cond=True), count=10, columns=5)
    assert module.seeds == whole.seeds, "randomness of a sample is its own"
    assert len(set(module.seeds)) == 10
    # One condition a class, going on from batch to batch.
    assert torch.cat(module.seen).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


# ---------------------------------------------------------------------- prompts


def test_prompts_lie_beside_the_pictures_in_their_order(tmp_path: Path) -> None:
    data = Data(cond=True, prompts=True)
    module = drawn(tmp_path, (3, 8, 8), data, count=5, columns=5)
    lines = (tmp_path / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"fox {n}" for n in range(5)]
    assert module.seen[0].tolist() == [2, 1, 0, 2, 1], "conditions of the same samples"
    assert module.prompts == [f"fox\n{n}" for n in range(5)]
    assert data.asked == 5, "no more of the data than is drawn"


def test_without_prompts_there_is_no_file_of_them(tmp_path: Path) -> None:
    drawn(tmp_path, (3, 8, 8), Data(cond=True), count=5)
    assert not (tmp_path / "samples" / "prompts.txt").exists()


# ---------------------------------------------------------------------- loggers


class Pictures(DummyLogger):
    """A logger with log_image and log_video, such as WandbLogger."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[str, str, int]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert all(isinstance(image, Image.Image) for image in images)
        self.logged.append(("image", key, step or 0))

    def log_video(self, key: str, videos: list[Any], step: int, format: list[str]) -> None:
        assert Image.open(videos[0]).format == "GIF"
        assert format == ["gif"]
        self.logged.append(("video", key, step))


class Client:
    """What MLFlowLogger.experiment offers for pictures and files."""

    def __init__(self) -> None:
        self.logged: list[tuple[Any, ...]] = []

    def log_image(self, run_id: str, image: Any, key: str, step: int) -> None:
        self.logged.append((run_id, image.size, key, step))

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        assert Path(path).exists()
        self.logged.append((run_id, Path(path).name, folder))


class MLFlow(MLFlowLogger):
    """MLFlowLogger with a client of our own, for its package need not be there."""

    def __init__(self) -> None:
        self.client = Client()

    @property
    def experiment(self) -> Any:
        return self.client

    @property
    def run_id(self) -> str:
        return "run"


def test_loggers_that_take_pictures_and_videos_get_them(tmp_path: Path) -> None:
    logger = Pictures()
    drawn(tmp_path, (3, 4, 8, 8), count=2, columns=2, loggers=[logger, DummyLogger()])
    assert logger.logged == [("image", "samples/ema_4_steps", 7), ("video", "clips/ema_4_steps", 7)]


def test_mlflow_gets_pictures_and_clips_through_its_client(tmp_path: Path) -> None:
    logger = MLFlow()
    drawn(tmp_path, (3, 4, 8, 8), count=2, columns=2, loggers=[logger])
    assert logger.client.logged == [
        ("run", (37, 19), "samples/ema_4_steps", 7),
        ("run", "00000007_ema_4_steps.webp", "samples"),
    ]


def test_tensorboard_gets_a_moving_image(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="tensorboard")
    drawn(tmp_path, (3, 4, 8, 8), count=2, columns=2, loggers=[logger])
    logger.experiment.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert sorted(read.Tags()["images"]) == ["clips/ema_4_steps", "samples/ema_4_steps"]
    (event,) = read.Images("clips/ema_4_steps")
    assert (event.step, event.width, event.height) == (7, 19, 10)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert (image.format, image.n_frames) == ("GIF", 4)
