"""Pictures of what the student makes, always from the same noise and conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from fewstep.contracts import FewStepSampler, ReferenceData
from fewstep.seeding import torch_generator


def picture(decoded: Tensor, columns: int, extent: float = 2.0) -> Tensor:
    """One uint8 image ``(3, H, W)`` of a batch.

    Args:
        decoded: images ``(B, C, H, W)`` in [-1, 1], laid out as a grid; or points ``(B, 2)``,
            drawn as a density over ``[-extent, extent]^2``.
        columns: images a row.
    """
    if decoded.ndim == 2:
        bins = torch.histogramdd(
            decoded.float().cpu(), bins=[96, 96], range=[-extent, extent, -extent, extent]
        ).hist.T.flip(0)
        level = 1 - (bins / bins.max().clamp_min(1)).sqrt()
        return (level * 255).to(torch.uint8).expand(3, -1, -1)
    grid = make_grid(decoded.float().cpu(), nrow=columns, padding=1, pad_value=0.0)
    return ((grid + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_picture(image: Tensor, path: Path) -> None:
    """Writes a uint8 image ``(3, H, W)`` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


class Samples(Callback):
    """Draws a picture for every step count and role, from noise that never changes.

    Pictures go to ``samples/`` in the run's folder and to TensorBoard. Two runs with the same data
    and sample shape start from the same noise and conditions, so pictures compare across methods.

    Args:
        num_steps: sampling step counts; those the method serves by default.
        count: samples a picture.
        columns: samples a row; conditions are ordered by class, so ten suit ten classes.
        roles: whose weights; the averaged student by default.
        every_n_updates: student updates between pictures; 0 draws at the end only.
        seed: of the noise.
    """

    def __init__(
        self,
        num_steps: list[int] | None = None,
        count: int = 40,
        columns: int = 10,
        roles: list[str] | None = None,
        every_n_updates: int = 0,
        seed: int = 0,
    ) -> None:
        self.num_steps = num_steps
        self.count = count
        self.columns = columns
        self.roles = roles
        self.every_n_updates = every_n_updates
        self.seed = seed
        self._cond: dict[str, Tensor] | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Draws every so many student updates, and at the last."""
        updates = trainer.global_step
        last = updates >= trainer.max_steps > 0
        if last or (self.every_n_updates and updates % self.every_n_updates == 0):
            self.draw(trainer, pl_module, updates)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws in ``fewstep validate`` and ``fewstep evaluate`` (not within training)."""
        if trainer.state.fn == "validate":
            record = getattr(pl_module, "loaded_metadata", None) or {}
            self.draw(trainer, pl_module, record.get("student_updates", 0))

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, updates: int) -> None:
        """Draws all pictures; the first rank writes them, all ranks sample (sharded roles)."""
        sampler = cast(FewStepSampler, pl_module)
        was_training = pl_module.training
        pl_module.eval()
        for role in self.roles or sampler.sampling_roles()[:1]:
            for steps in self.num_steps or sampler.step_counts(role):
                image = self._image(trainer, pl_module, role, steps)
                if trainer.is_global_zero:
                    name = f"{role}_{steps}_steps"
                    folder = Path(trainer.default_root_dir) / "samples"
                    save_picture(image, folder / f"{updates:08d}_{name}.png")
                    for logger in trainer.loggers:
                        if isinstance(logger, TensorBoardLogger):
                            logger.experiment.add_image(f"samples/{name}", image, updates)
        pl_module.train(was_training)

    def _image(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, role: str, steps: int
    ) -> Tensor:
        sampler, device = cast(FewStepSampler, pl_module), pl_module.device
        count = 16 * self.count if len(sampler.sample_shape) == 1 else self.count
        noise_source = torch_generator(self.seed, "samples-noise")
        noise = torch.randn(count, *sampler.sample_shape, generator=noise_source).to(device)
        generator = torch_generator(self.seed, "samples-sampler", device=device)
        cond = {
            name: value[torch.arange(count) % len(value)].to(device)
            for name, value in self._conditions(trainer).items()
        }
        x0 = sampler.sample(noise, cond or None, steps, generator, role)
        return picture(sampler.decode(x0), self.columns)

    def _conditions(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """One condition a class for labelled data (in order), else the first ones there are."""
        if self._cond is None:
            data = cast(ReferenceData, cast(Any, trainer).datamodule)
            batches = list(data.reference_batches())
            cond = {n: torch.cat([b["cond"][n] for b in batches]) for n in batches[0]["cond"]}
            if set(cond) == {"class_labels"}:
                cond = {"class_labels": cond["class_labels"].unique()}
            self._cond = cond
        return self._cond
