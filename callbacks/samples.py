"""Pictures of what the student makes, always from the same noise and conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.clips import ClipFormat, clip, encode, strip
from callbacks.logged import log_clip, log_picture
from callbacks.pictures import as_pixels, picture, save_picture
from callbacks.together import on_every_rank
from fewstep.contracts import FewStepSampler, ReferenceData, SteeredSampler
from fewstep.seeding import torch_generator

__all__ = ["PROMPTS_FILE", "Samples", "picture", "save_picture"]

# Samples among whose conditions all classes are looked for.
MANY = 4096
PROMPTS_FILE = "prompts.txt"


class Samples(Callback):
    """Draws a picture for every step count and role, from noise that never changes.

    Pictures go to ``samples/`` in the run's folder and to the run's loggers. Two runs with the same
    data and sample shape start from the same noise and conditions, so pictures compare across
    methods. Videos become an animation of the whole grid and, as the picture, the frames of its
    first row. Where the data have prompts, ``samples/prompts.txt`` holds one a line, in the grid's
    reading order.

    Args:
        num_steps: sampling step counts; those the method serves by default.
        count: samples a picture.
        columns: samples a row; conditions are ordered by class, so ten suit ten classes.
        roles: whose weights; the averaged student by default.
        every_n_updates: student updates between pictures; 0 draws at the end only.
        seed: of the noise.
        batch_size: samples made at a time; fewer where large pictures do not fit into memory.
        max_picture_width: of a picture, in pixels; larger grids are made smaller.
        max_clip_width: of an animation, in pixels; larger grids are made smaller.
        fps: frames a second of animations.
        clip_format: of animations in the run's folder: webp, or gif, which is larger and has 256
            colours but plays everywhere.
    """

    def __init__(
        self,
        num_steps: list[int] | None = None,
        count: int = 40,
        columns: int = 10,
        roles: list[str] | None = None,
        every_n_updates: int = 0,
        seed: int = 0,
        batch_size: int = 40,
        max_picture_width: int = 2048,
        max_clip_width: int = 1024,
        fps: float = 8.0,
        clip_format: ClipFormat = "webp",
    ) -> None:
        self.num_steps = num_steps
        self.count = count
        self.columns = columns
        self.roles = roles
        self.every_n_updates = every_n_updates
        self.seed = seed
        self.batch_size = batch_size
        self.max_picture_width = max_picture_width
        self.max_clip_width = max_clip_width
        self.fps = fps
        self.clip_format = clip_format
        self._cond: dict[str, Tensor] | None = None
        self._prompts: list[str] = []

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
                made = self._samples(trainer, pl_module, role, steps)
                if trainer.is_global_zero:
                    self._write(trainer, made, f"{role}_{steps}_steps", updates)
        if trainer.is_global_zero and self._prompts:
            lines = [" ".join(prompt.split()) for prompt in self._prompts[: self.count]]
            path = Path(trainer.default_root_dir) / "samples" / PROMPTS_FILE
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pl_module.train(was_training)

    def _write(self, trainer: pl.Trainer, made: Tensor, name: str, updates: int) -> None:
        """Writes a picture, and a clip of videos, to the run's folder and loggers."""
        path = Path(trainer.default_root_dir) / "samples" / f"{updates:08d}_{name}.png"
        video = made.ndim == 5
        draw = strip if video else picture
        image = draw(made, self.columns, max_width=self.max_picture_width)
        save_picture(image, path)
        for logger in trainer.loggers:
            log_picture(logger, f"samples/{name}", image, updates)
        if video:
            frames = clip(made, self.columns)
            moving = path.with_suffix(f".{self.clip_format}")
            moving.write_bytes(encode(frames, self.fps, self.clip_format))
            for logger in trainer.loggers:
                log_clip(logger, f"clips/{name}", frames, self.fps, updates, moving)

    def _samples(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, role: str, steps: int
    ) -> Tensor:
        """Samples on the CPU, as small as they will be drawn; nothing on ranks that do not draw."""
        sampler, device = cast(FewStepSampler, pl_module), pl_module.device
        points = len(sampler.sample_shape) == 1
        count = 16 * self.count if points else self.count
        noise_source = torch_generator(self.seed, "samples-noise")
        noise = torch.randn(count, *sampler.sample_shape, generator=noise_source)
        conditions = self._conditions(trainer, count)
        made = []
        for rows in torch.arange(count).split(count if points else self.batch_size):
            cond = {n: value[rows % len(value)].to(device) for n, value in conditions.items()}
            # A generator a sample: the size of batches changes no picture.
            generators = [torch_generator(self.seed, "samples-sampler", n) for n in rows.tolist()]
            prompts = [self._prompts[n % len(self._prompts)] for n in rows if self._prompts]
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                x0 = sampler.sample(
                    noise[rows].to(device), cond or None, steps, generators, role, prompts or None
                )
                decoded = sampler.decode(x0)
            if trainer.is_global_zero:
                width = self.max_clip_width if decoded.ndim == 5 else self.max_picture_width
                made.append(decoded if points else as_pixels(decoded, self.columns, width))
        if isinstance(pl_module, SteeredSampler):
            on_every_rank(trainer, pl_module.check_guidance)
        return torch.cat(made) if made else torch.empty(0)

    def _conditions(self, trainer: pl.Trainer, count: int) -> dict[str, Tensor]:
        """One condition a class for labelled data, in order; else those of the first samples."""
        if self._cond is None:
            data = cast(ReferenceData, cast(Any, trainer).datamodule)
            cond, prompts = data.reference_conditions(range(count))
            if set(cond) == {"class_labels"} and prompts is None:
                many = data.reference_conditions(range(MANY)).cond["class_labels"]
                cond = {"class_labels": many.unique()}
            self._cond, self._prompts = cond, prompts or []
        return self._cond
