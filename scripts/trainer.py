"""A Trainer with fewstep's own commands beside fit and validate."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks import Evaluation, Samples
from fewstep.errors import FewstepError
from lightning_modules import FewStepModule
from scripts.plan import Strategy, as_dict, format_plan, plan_of


class FewstepTrainer(pl.Trainer):
    """Lightning's Trainer; each method here is a command and its arguments are its options.

    Attributes:
        run_name: the experiment a run belongs to, such as ``digits/pcm``.
    """

    run_name: str = "run"

    def evaluate(
        self,
        model: FewStepModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        steps: list[int] | None = None,
        roles: list[str] | None = None,
        seeds: list[int] | None = None,
        num_samples: int | None = None,
    ) -> None:
        """Measure a trained model at several step counts; writes results.json.

        Args:
            ckpt_path: Checkpoint file or run folder; the experiment's newest by default.
            steps: Sampling step counts, such as --steps 1 2 4 8; the experiment's by default.
            roles: Whose weights: ema, student or teacher; the averaged student by default.
            seeds: Seeds of the sampling noise; each gives a measurement of its own.
            num_samples: Generated samples a measurement.
        """
        callback = self._only(Evaluation)
        callback.num_steps = steps or callback.num_steps
        callback.roles = roles or callback.roles
        callback.seeds = seeds or callback.seeds
        callback.num_samples = num_samples or callback.num_samples
        self._run_validation(model, datamodule, ckpt_path)
        print(f"Results: {Path(self.default_root_dir) / 'results.json'}")

    def sample(
        self,
        model: FewStepModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        steps: list[int] | None = None,
        roles: list[str] | None = None,
        seed: int = 0,
        count: int = 40,
    ) -> None:
        """Draw sample pictures at several step counts; writes samples/*.png of the run.

        Args:
            ckpt_path: Checkpoint file or run folder; the experiment's newest by default.
            steps: Sampling step counts, such as --steps 1 2 4 8; the experiment's by default.
            roles: Whose weights: ema, student or teacher; the averaged student by default.
            seed: Seed of the noise.
            count: Samples a picture.
        """
        callback = self._only(Samples)
        callback.num_steps = steps or callback.num_steps
        callback.roles = roles or callback.roles
        callback.seed, callback.count = seed, count
        self._run_validation(model, datamodule, ckpt_path)
        print(f"Pictures: {Path(self.default_root_dir) / 'samples'}")

    def plan(
        self,
        model: FewStepModule,
        datamodule: pl.LightningDataModule | None = None,
        devices: int | None = None,
        strategy: Strategy | None = None,
        json: str | None = None,
    ) -> None:
        """Say what an experiment will cost: parameters, memory, network evaluations, FLOPs.

        Args:
            devices: Number of devices in all; the experiment's by default.
            strategy: Replicate roles on all devices (ddp) or shard them (fsdp2); the experiment's
                by default.
            json: File to write the plan to as well.
        """
        sharded = isinstance(self.strategy, ModelParallelStrategy)
        found = plan_of(
            model,
            datamodule,
            devices or self.world_size,
            strategy or ("fsdp2" if sharded else "ddp"),
            str(self.precision),
        )
        print(format_plan(found))
        if json is not None:
            Path(json).write_text(dumps(as_dict(found), indent=2) + "\n")

    def _only(self, kind: type[Any]) -> Any:
        """Keeps one of the measuring callbacks and drops the other."""
        found = [c for c in cast(Any, self).callbacks if isinstance(c, kind)]
        if not found:
            raise FewstepError(
                f"This experiment has no {kind.__name__} callback; add callbacks.{kind.__name__} "
                "to trainer.callbacks."
            )
        measuring = (Evaluation, Samples)
        cast(Any, self).callbacks = [
            c for c in cast(Any, self).callbacks if c is found[0] or not isinstance(c, measuring)
        ]
        return found[0]

    def _run_validation(self, model: FewStepModule, datamodule: Any, ckpt_path: str | None) -> None:
        """Uses the validation loop for its set-up: strategy, precision, checkpoint, data."""
        self.limit_val_batches = 1
        self.validate(
            model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True
        )
