"""Metrics at several step counts, during training and on their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.console import say
from callbacks.generation import Cell, Scene
from callbacks.judges import check_judges
from callbacks.matrix import Matrix
from callbacks.reference_sets import Against, ReferenceSets, check_against
from callbacks.results import Measurement, check_names, write_results
from callbacks.together import on_each_machine, on_every_rank, on_first_rank
from fewstep.contracts import FewStepSampler, FinishedSet, SteeredSampler
from fewstep.errors import FewstepError
from fewstep.metrics import Metric, ReferenceStore, share_features


class Evaluation(Callback):
    """Measures generated samples: weights x step counts x seeds x metrics.

    A sample's noise and condition are functions of (seed, its number) alone: the same for all step
    counts, roles and runs, whatever the number of ranks. Ranks share the samples. At the end of
    training, and of ``fewstep evaluate``, the numbers are written to ``results.json`` with their
    protocol.

    Args:
        metrics: what is measured; those over the same features share one network.
        num_steps: sampling step counts; those the method serves by default.
        num_samples: generated samples.
        roles: whose weights; the averaged student by default.
        every_n_updates: student updates between evaluations; 0 evaluates at the end only.
        num_samples_in_training: samples of the evaluations before the last one.
        max_share: of the time since training started, what evaluations before the last one may
            take; one that would take more is left out. The first one never is.
        batch_size: samples generated at a time by a rank.
        seeds: seeds of the evaluation's noise; each gives a measurement of its own.
        against: what samples are compared with: the data set, and samples of the teacher from
            noise of their own, whose values are called ``.._to_teacher``. Where a method has none,
            it is left out beside the data: a folder's experiments can share a setting.
        teacher_steps: sampling steps of the teacher where students are compared with it.
        references: folder of reference statistics, which are computed once for a data set,
            features and protocol; below FEWSTEP_CACHE by default.

    Raises:
        FewstepError: if two metrics give values of one name.
    """

    def __init__(
        self,
        metrics: list[Metric],
        num_steps: list[int] | None = None,
        num_samples: int = 4096,
        roles: list[str] | None = None,
        every_n_updates: int = 0,
        num_samples_in_training: int = 1024,
        max_share: float = 0.1,
        batch_size: int = 512,
        seeds: list[int] | None = None,
        against: list[Against] | None = None,
        teacher_steps: int = 50,
        references: str | None = None,
    ) -> None:
        check_names(metrics)
        self.metrics = metrics
        self.num_steps = num_steps
        self.num_samples = num_samples
        self.roles = roles
        self.every_n_updates = every_n_updates
        self.num_samples_in_training = num_samples_in_training
        self.max_share = max_share
        self.batch_size = batch_size
        self.seeds = seeds or [0]
        self.against: list[Against] = against or ["data"]
        self.references = ReferenceSets(
            metrics, ReferenceStore(references), teacher_steps, num_samples
        )
        self.seconds = self._last_seconds = 0.0
        self._began = time.monotonic()
        self._prepared = self._loaded = False

    # ------------------------------------------------------------------ when

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds out what would fail at the first evaluation, which may be days away.

        Raises:
            FewstepError: on all ranks, for weights, prompts, a reference, a role or a teacher that
                are not there, and for fewer samples than a metric takes.
        """
        scene = Scene(trainer, pl_module, self.batch_size)
        self._prepare(scene)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock that the evaluation's share of the run is told by."""
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Evaluates every so many student updates."""
        updates = trainer.global_step
        last = updates >= trainer.max_steps > 0
        due = self.every_n_updates and updates % self.every_n_updates == 0 and not last
        if due and on_first_rank(trainer, self._affordable):
            self.run(trainer, pl_module, self.num_samples_in_training, self.seeds[:1])

    def _affordable(self) -> bool:
        """Whether one more evaluation like the last fits into the share of time."""
        elapsed = time.monotonic() - self._began
        return self.seconds + self._last_seconds <= self.max_share * (elapsed + self._last_seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the trained student and writes the results."""
        if trainer.global_step >= trainer.max_steps >= 0:
            self._run_and_write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates in ``fewstep validate`` and ``fewstep evaluate`` (not within training)."""
        if trainer.state.fn == "validate":
            self._run_and_write(trainer, pl_module)

    def _run_and_write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = self.run(trainer, pl_module, self.num_samples, self.seeds)
        if isinstance(pl_module, SteeredSampler):
            pl_module.write_traces()
        cost = {"seconds": round(self.seconds, 3)}
        if trainer.state.fn == "fit":
            cost["share_of_run"] = self.seconds / (time.monotonic() - self._began)
        on_first_rank(trainer, lambda: write_results(trainer, pl_module, found, cost))

    # ------------------------------------------------------------------ what

    def run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        num_samples: int,
        seeds: Sequence[int],
    ) -> list[Measurement]:
        """Measures all combinations of role, step count, seed and metric; a collective.

        Raises:
            FewstepError: as :meth:`on_fit_start`, and if samples are not finite.
        """
        started = time.monotonic()
        sampler = cast(FewStepSampler, pl_module)
        roles = self.roles or sampler.sampling_roles()[:1]
        cells = [
            Cell(role, steps, seed)
            for role in roles
            for steps, seed in product(self.num_steps or sampler.step_counts(role), seeds)
        ]
        scene = Scene(trainer, pl_module, self.batch_size)
        was_training = pl_module.training
        pl_module.eval()
        try:
            self._load(scene)
            matrix = Matrix(scene, self.references, self._compared(scene), num_samples)
            found = matrix.measure(cells)
        finally:
            pl_module.train(was_training)
        if trainer.state.fn == "fit":
            self._make_room(pl_module)
        self._last_seconds = time.monotonic() - started
        self.seconds += self._last_seconds
        self._report(trainer, found)
        return found

    def _compared(self, scene: Scene) -> list[Against]:
        if "data" not in self.against or "teacher" in scene.sampler.sampling_roles():
            return self.against
        return ["data"]

    def _check(self, scene: Scene) -> None:
        """Looks for what an evaluation needs beside the networks of its metrics."""
        _ = scene.data
        for against in self._compared(scene):
            check_against(scene, against)
        known = scene.sampler.sampling_roles()
        for role in self.roles or []:
            if role not in known:
                raise FewstepError(
                    f"The Evaluation callback's `roles` has '{role}', which cannot sample in this "
                    f"run; choose from {known}."
                )
        numbers = {"num_samples": self.num_samples}
        if self.every_n_updates:
            numbers["num_samples_in_training"] = self.num_samples_in_training
        for option, number in numbers.items():
            self._check_number(option, number)
        check_judges(self.metrics, scene.module)
        self._check_conditions(scene)
        demanding = [type(metric).__name__ for metric in self.metrics if metric.needs_prompts]
        finished = isinstance(scene.module, FinishedSet)  # whose samples have their own prompts
        if finished or not demanding:
            return
        if scene.data.reference_conditions(range(1)).prompt is None:
            raise FewstepError(
                f"{' and '.join(demanding)} can only measure samples with prompts, and these data "
                "have none. Take data with prompts, or leave it out of the Evaluation callback's "
                "`metrics`."
            )

    def _check_conditions(self, scene: Scene) -> None:
        """Looks for conditions that metrics need."""
        for metric in self.metrics:
            for name in metric.needs_conditions:
                known = scene.data.reference_conditions(range(1)).cond
                if name not in known:
                    raise FewstepError(
                        f"{type(metric).__name__} compares with each sample's '{name}', and these "
                        f"data have {', '.join(known) or 'no conditions'}. Take data that have it, "
                        "or leave it out of the Evaluation callback's `metrics`."
                    )

    def _check_number(self, option: str, number: int) -> None:
        for metric in self.metrics:
            try:
                metric.check(number)
            except FewstepError as error:
                raise FewstepError(f"The Evaluation callback's {option}: {error}") from error

    def _prepare(self, scene: Scene) -> None:
        """Looks, once, for all that evaluations need; a collective."""
        if self._prepared:
            return
        on_every_rank(scene.trainer, lambda: self._check(scene))
        for features in share_features(self.metrics):
            on_each_machine(scene.trainer, features.prepare)
        self._prepared = True

    def _load(self, scene: Scene) -> None:
        """Loads the feature networks, or brings them back to the device."""
        self._prepare(scene)
        device = scene.module.device
        for features in share_features(self.metrics):
            place = features.to if self._loaded else features.load
            on_every_rank(scene.trainer, partial(place, device))
        if not self._loaded:  # networks are known once they are there
            on_every_rank(scene.trainer, partial(check_judges, self.metrics, scene.module))
        self._loaded = True

    def _make_room(self, pl_module: pl.LightningModule) -> None:
        """Takes what only evaluations use off the GPU, which training needs whole."""
        for features in share_features(self.metrics) if self._loaded else []:
            features.to(torch.device("cpu"))
        companions = getattr(pl_module, "companions", None)  # of methods on pipelines
        if companions is not None:
            companions.release()
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()

    def _report(self, trainer: pl.Trainer, found: list[Measurement]) -> None:
        first_seed = [m for m in found if m.seed == found[0].seed]
        values = {f"eval/{m.metric}/{m.role}/{m.num_steps}_steps": m.value for m in first_seed}
        values["eval/seconds"] = self.seconds
        for logger in trainer.loggers:
            if trainer.state.fn == "fit":
                logger.log_metrics(values, step=trainer.global_step)
        for role in dict.fromkeys(m.role for m in first_seed):
            for metric in dict.fromkeys(m.metric for m in first_seed):
                row = [m for m in first_seed if (m.role, m.metric) == (role, metric)]
                figures = "   ".join(f"{m.num_steps}: {m.value:.3g}" for m in row)
                say(trainer, f"{metric} of {role} at sampling steps   {figures}")
