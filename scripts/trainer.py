"""A Trainer with fewstep's own commands beside fit and validate."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from callbacks import Evaluation, Preemption, Samples
from callbacks.console import say
from callbacks.results import FILE_NAME, measured_of, source_of
from fewstep.errors import FewstepError
from lightning_modules import FewStepModule, Steering
from scripts.evaluate import DrawnPipeline, FinishedSamples, PipelineSampler, exported_steps
from scripts.evaluate.pipelines import ROLE
from scripts.plan import Strategy, as_dict, format_plan, plan_of


class FewstepTrainer(pl.Trainer):
    """Lightning's Trainer; each method here is a command and its arguments are its options.

    Attributes:
        run_name: the experiment a run belongs to, such as ``digits/pcm``.
        asked: devices, strategy and copies of sharded roles that a plan is for, which this machine
            need not have.
    """

    run_name: str = "run"
    asked: tuple[int, Strategy, int] = (1, "ddp", 1)

    def evaluate(
        self,
        model: FewStepModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        steps: list[int] | None = None,
        roles: list[str] | None = None,
        seeds: list[int] | None = None,
        num_samples: int | None = None,
        samples: str | None = None,
        pipeline: str | None = None,
        guidance: float | None = None,
        steering: Steering | None = None,
    ) -> None:
        """Measure a trained model, a pipeline or finished samples; writes results.json.

        Args:
            ckpt_path: Checkpoint file or run folder; the experiment's newest by default.
            steps: Sampling step counts, such as --steps 1 2 4 8; the experiment's by default.
            roles: Whose weights: ema, student or teacher; the averaged student by default.
            seeds: Seeds of the sampling noise; each gives a measurement of its own.
            num_samples: Generated samples a measurement.
            samples: Folder of finished images or videos, or of shards of them, to measure instead;
                the experiment supplies data and metrics, and --steps what they were made in.
            pipeline: Folder of a diffusers pipeline to sample with instead.
            guidance: Guidance scale of the pipeline (its own default if not given), or the one
                that finished samples were made with.
            steering: Training-free guidance to sample with: an experiment that has it, such as
                --steering guidance/digits/polyak, single values of which can be overridden. The
                results go to a folder of their own.
        """
        self._steer(model, steering, samples or pipeline)
        callback = self._only(Evaluation)
        callback.num_steps = steps or callback.num_steps
        callback.roles = roles or callback.roles
        callback.seeds = seeds or callback.seeds
        callback.num_samples = num_samples or callback.num_samples
        callback.references.teacher_samples = num_samples or callback.references.teacher_samples
        if samples is not None or pipeline is not None:
            callback.against = ["data"]  # what stands in for a method has no teacher
        method: pl.LightningModule = model
        if samples is not None:
            done = FinishedSamples(
                Path(samples),
                datamodule,
                (steps or [0])[0],
                1.0 if guidance is None else guidance,
                num_samples,
            )
            if (note := done.note(callback.num_samples)) is not None:
                say(self, note)
            callback.num_samples, callback.roles = done.num_finished, [done.role]
            callback.num_steps, method = done.steps, done
        elif pipeline is not None:
            callback.roles = [ROLE]
            method = PipelineSampler(Path(pipeline), callback.num_steps or [1, 2, 4, 8], guidance)
        self._run_validation(method, datamodule, ckpt_path)
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
        pipeline: str | None = None,
        guidance: float | None = None,
        steering: Steering | None = None,
    ) -> None:
        """Draw sample pictures at several step counts; writes samples/*.png of the run.

        Args:
            ckpt_path: Checkpoint file or run folder; the experiment's newest by default.
            steps: Sampling step counts, such as --steps 1 2 4 8; the experiment's by default.
            roles: Whose weights: ema, student or teacher; the averaged student by default.
            seed: Seed of the noise.
            count: Samples a picture.
            pipeline: Folder of a diffusers pipeline to sample with instead, such as an export; from
                the same noise and prompts.
            guidance: Guidance scale of the pipeline; its own default, or its card's, if not given.
            steering: Training-free guidance to sample with, as for evaluate.
        """
        self._steer(model, steering, pipeline)
        callback = self._only(Samples)
        callback.num_steps = steps or callback.num_steps
        callback.roles = roles or callback.roles
        callback.seed, callback.count = seed, count
        method: pl.LightningModule = model
        if pipeline is not None:
            folder = Path(pipeline)
            callback.num_steps = steps or exported_steps(folder) or callback.num_steps
            callback.num_steps = callback.num_steps or [1, 2, 4, 8]
            callback.roles = [ROLE]
            method = DrawnPipeline(folder, callback.num_steps, guidance)
        self._run_validation(method, datamodule, ckpt_path)
        print(f"Pictures: {Path(self.default_root_dir) / 'samples'}")

    def plan(
        self,
        model: FewStepModule,
        datamodule: pl.LightningDataModule | None = None,
        devices: int | None = None,
        strategy: Strategy | None = None,
        replicas: int | None = None,
        devices_per_node: int = 8,
        json: str | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Say what an experiment will cost: parameters, memory, network evaluations, FLOPs.

        Args:
            devices: Number of devices in all; the experiment's by default.
            strategy: Replicate roles on all devices (ddp) or shard them (fsdp2); the experiment's
                by default.
            replicas: With fsdp2, copies of the sharded roles, among which the devices are divided;
                the experiment's by default.
            devices_per_node: How many of the devices, at most, are in one machine.
            json: File to write the plan to as well.
            ckpt_path: Of no effect on costs; taken so that a run's own config.yaml can be planned.
        """
        asked_devices, asked_strategy, asked_replicas = self.asked
        if strategy == "ddp":
            asked_replicas = 1
        found = plan_of(
            model,
            datamodule,
            devices or asked_devices,
            strategy or asked_strategy,
            str(self.precision),
            replicas or asked_replicas,
            devices_per_node,
        )
        print(format_plan(found))
        if json is not None:
            Path(json).write_text(dumps(as_dict(found), indent=2) + "\n")

    def _steer(self, model: FewStepModule, steering: Steering | None, instead: str | None) -> None:
        """Steers a method's sampling, if it is to be steered."""
        if steering is None:
            return
        if instead is not None:
            raise FewstepError(
                f"--steering guides the experiment's own networks, not '{instead}'. Leave one of "
                "the two out."
            )
        model.steer(steering)

    def _run_stage(self) -> Any:
        """Runs the loop; a run that has no update left is only evaluated, if it was not.

        Lightning would end at once. Such is a run that was preempted while it measured, and one
        that trains nothing (``max_steps: 0``), of which samples are drawn here too.
        """
        if self.state.fn != "fit" or not self.global_step >= self.max_steps >= 0:
            return super()._run_stage()
        callbacks = cast(Any, self).callbacks
        measuring = [c for c in callbacks if isinstance(c, Evaluation)]
        done = f"Training is done: the checkpoint is of update {self.global_step:,}"
        if self.max_steps == 0:
            done = f"{type(self.lightning_module).__name__} trains nothing (trainer.max_steps: 0)"
        self.training = False  # there is no progress bar to print above of
        if not measuring or self.strategy.broadcast(self._evaluated()):
            say(self, f"{done}, and there is nothing left to do.")
            return None
        say(self, f"{done}. What is left is its evaluation.")
        for callback in callbacks:
            if isinstance(callback, Preemption):
                callback.on_train_start(self, self.lightning_module)
        for callback in measuring:
            callback.on_train_end(self, self.lightning_module)
        drawing = [c for c in callbacks if isinstance(c, Samples) and self.max_steps == 0]
        for callback in drawing:
            callback.draw(self, self.lightning_module, 0)
        return None

    def _evaluated(self) -> bool:
        """Whether results.json holds measurements of the student as it is, and as it is steered."""
        path = Path(self.default_root_dir) / FILE_NAME
        source = source_of(self, self.lightning_module, self.global_step)
        return path.exists() and bool(measured_of(path, source))

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

    def _run_validation(
        self, model: pl.LightningModule, datamodule: Any, ckpt_path: str | None
    ) -> None:
        """Uses the validation loop for its set-up: strategy, precision, checkpoint, data."""
        self.limit_val_batches = 1
        self.validate(
            model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True
        )
