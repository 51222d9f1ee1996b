"""Real handwritten digits, 8 x 8, that ship inside scikit-learn: a data set with no download.

The set is the test part of the UCI "Optical Recognition of Handwritten Digits" data: 1,797 images
with grey values 0 to 16. It is written once as WebDataset shards, then streamed like any other.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from datamodules.fields import ClassLabel, Images
from datamodules.streaming import Shards

NUM_HELD_OUT = 180
RECORDS_PER_SHARD = 128
SPLIT_SEED = 0


def write_digit_shards(folder: Path) -> None:
    """Writes ``train-*.tar`` and ``val-*.tar`` below ``folder``, all or nothing."""
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    splits = {"val": order[:NUM_HELD_OUT], "train": order[NUM_HELD_OUT:]}
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    for split, numbers in splits.items():
        pattern = str(partial / f"{split}-%06d.tar")
        with wds.ShardWriter(pattern, maxcount=RECORDS_PER_SHARD, verbose=0) as writer:
            for number in numbers:
                pixels = np.round(data.images[number] * (255 / 16)).astype(np.uint8)
                encoded = io.BytesIO()
                Image.fromarray(pixels).save(encoded, format="PNG")
                writer.write(
                    {
                        "__key__": f"{number:06d}",
                        "png": encoded.getvalue(),
                        "cls": str(data.target[number]).encode(),
                    }
                )
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


class Digits(Shards):
    """The handwritten digits, written as shards on first use.

    1,617 training and 180 held-out images ``(1, 8, 8)`` with class labels 0 to 9.

    Args:
        folder: where the shards are, or will be written.
        batch_size: records a device and update.
        num_workers: loading processes a device.
        max_damaged: damaged records tolerated in a run before it stops.
        seed: of the order.
    """

    def __init__(
        self,
        folder: str = "data/digits",
        batch_size: int = 128,
        num_workers: int = 0,
        max_damaged: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(
            shards=f"{folder}/train-*.tar",
            val_shards=f"{folder}/val-*.tar",
            batch_size=batch_size,
            sample=Images(size=8, channels=1),
            conditions={"class_labels": ClassLabel(num_classes=10)},
            num_workers=num_workers,
            max_damaged=max_damaged,
            seed=seed,
        )
        self.folder = Path(folder)

    def prepare_data(self) -> None:
        """Writes the shards unless their folder exists."""
        if not self.folder.exists():
            write_digit_shards(self.folder)
        super().prepare_data()
