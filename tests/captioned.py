"""Data of captioned pictures for tests of methods on diffusers pipelines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from fewstep.contracts import Batch
from lightning_modules import FewStepModule

from rings import quiet_trainer

PROMPTS = ["a red fox", "an owl at night", "two cats", ""]


class Captioned(pl.LightningDataModule):
    """The same few pictures or latents with captions, for ever."""

    def __init__(self, sample: Tensor, cond: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.batch: Batch = {
            "sample": sample,
            "cond": cond or {},
            "key": [str(n) for n in range(len(sample))],
        }
        if not cond:
            self.batch["prompt"] = PROMPTS[: len(sample)]

    def train_dataloader(self) -> Any:
        return DataLoader([copy.deepcopy(self.batch)] * 100, batch_size=None)


def trained(module: FewStepModule, data: Captioned, tmp_path: Path, updates: int = 2) -> Any:
    quiet_trainer(tmp_path, [], updates).fit(module, data, weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}
