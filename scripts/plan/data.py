"""What an experiment's data say of its cost, without reading them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from datamodules import Mixed, Shards, VideosWithImages
from datamodules.index import SUFFIX, summary
from datamodules.several import Several
from fewstep.contracts import Batch
from fewstep.diffusion.denoiser import Backbone
from fewstep.errors import FewstepError
from fewstep.networks.families import DiffusersBackbone
from lightning_modules import FewStepModule
from scripts.plan.judges import judged


@dataclass(frozen=True)
class Data:
    """The data's share in a plan.

    Attributes:
        batch_size: samples a device and update.
        records: training records, where that is known without reading them.
        unknown: why it is not, otherwise.
    """

    batch_size: int
    records: int | None
    unknown: str | None = None


def data_of(datamodule: pl.LightningDataModule | None) -> Data:
    """Batch size and number of records of an experiment's datamodule."""
    if isinstance(datamodule, Mixed):
        datamodule = datamodule.reference
        return Data(datamodule.batch_size, None, "a mixed stream has no epochs")
    if isinstance(datamodule, VideosWithImages):
        datamodule = datamodule.videos
    batch_size = int(getattr(datamodule, "batch_size", 1))
    if not isinstance(datamodule, Shards):
        return Data(batch_size, None, "these data are made as they are needed")
    try:
        return Data(batch_size, *_records(datamodule))
    except FewstepError as error:
        return Data(batch_size, None, str(error).split(". ")[0].rstrip("."))


def _records(datamodule: Shards) -> tuple[int | None, str | None]:
    """Adds up what the shards' indexes say."""
    sources, total = datamodule.sources, 0
    patterns = datamodule.shards
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not all(map(sources.is_local, listed)):
        return None, "the shards are not on this machine"
    for shard in sources.expand(listed):
        own = sources.own(shard, SUFFIX)
        index = sources.companion(shard, SUFFIX) or (own if own.is_file() else None)
        if index is None:
            return None, f"the shard '{shard}' has no index yet (fewstep shards index makes it)"
        total += summary(index).records
    return total, None


def example_batch(
    model: FewStepModule, datamodule: pl.LightningDataModule | None, size: int
) -> Batch:
    """A batch of the shapes that training sees, zeros throughout.

    Args:
        model: the method, with its roles built; says what a sample is.
        datamodule: says which conditions come with it.
        size: samples.

    Raises:
        FewstepError: if the data alone know the shape of a condition.
    """
    data = datamodule.reference if isinstance(datamodule, Several) else datamodule
    conditions = dict(getattr(data, "conditions", {}))
    accepted = inspect.signature(model.student.backbone.forward).parameters
    if not isinstance(data, Shards) and "class_labels" in accepted:
        conditions = {"class_labels": None}
    cond = _text(model.student.backbone, size)
    unknown = sorted(set(conditions) - {"class_labels", *(("prompt", *cond) if cond else ())})
    if unknown:
        raise FewstepError(f"the shape of {', '.join(unknown)} is known to the data alone")
    if "class_labels" in conditions:
        cond["class_labels"] = torch.zeros(size, dtype=torch.long)
    batch: Batch = {
        "sample": torch.zeros(size, *model.sample_shape),
        "cond": cond,
        "key": [""] * size,
    }
    per_video = datamodule.per_video if isinstance(datamodule, VideosWithImages) else 0
    return judged(model, data, batch, per_video)


def _text(backbone: Backbone, size: int) -> dict[str, Any]:
    """Conditions of the shapes that the backbone knows."""
    shapes = backbone.text_shapes if isinstance(backbone, DiffusersBackbone) else {}
    return {name: torch.zeros(size, *shape) for name, shape in shapes.items()}
