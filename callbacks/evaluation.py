"""Metrics at several step counts, during training and on their own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.console import say
from callbacks.results import Measurement, write_results
from fewstep.contracts import FewStepSampler, ReferenceData
from fewstep.errors import FewstepError
from fewstep.metrics import Accumulator, Metric
from fewstep.seeding import torch_generator

Cond = dict[str, Tensor]


class Evaluation(Callback):
    """Measures generated samples against the datamodule's reference, at every step count.

    Noise is a function of (seed, number of the sample) alone: the same for all step counts, roles
    and runs, and whatever the number of ranks. At the end of training, and of
    ``fewstep evaluate``, the numbers are written to ``results.json`` with their protocol.

    Args:
        metrics: what is measured.
        num_steps: sampling step counts; those the method serves by default.
        num_samples: generated samples.
        roles: whose weights; the averaged student by default.
        every_n_updates: student updates between evaluations; 0 evaluates at the end only.
        num_samples_in_training: samples of the evaluations before the last one.
        batch_size: samples generated at a time.
        seeds: seeds of the evaluation's noise; each gives a measurement of its own.
    """

    def __init__(
        self,
        metrics: list[Metric],
        num_steps: list[int] | None = None,
        num_samples: int = 4096,
        roles: list[str] | None = None,
        every_n_updates: int = 0,
        num_samples_in_training: int = 1024,
        batch_size: int = 512,
        seeds: list[int] | None = None,
    ) -> None:
        self.metrics = metrics
        self.num_steps = num_steps
        self.num_samples = num_samples
        self.roles = roles
        self.every_n_updates = every_n_updates
        self.num_samples_in_training = num_samples_in_training
        self.batch_size = batch_size
        self.seeds = seeds or [0]
        self.seconds = 0.0
        self._cond: Cond | None = None
        self._ready = False

    # ------------------------------------------------------------------ when

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Evaluates every so many student updates."""
        updates = trainer.global_step
        last = updates >= trainer.max_steps > 0
        if self.every_n_updates and updates % self.every_n_updates == 0 and not last:
            self.run(trainer, pl_module, self.num_samples_in_training, self.seeds[:1])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the trained student and writes the results."""
        if trainer.global_step >= trainer.max_steps > 0:
            found = self.run(trainer, pl_module, self.num_samples, self.seeds)
            write_results(trainer, pl_module, found)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates in ``fewstep validate`` and ``fewstep evaluate`` (not within training)."""
        if trainer.state.fn == "validate":
            found = self.run(trainer, pl_module, self.num_samples, self.seeds)
            write_results(trainer, pl_module, found)

    # ------------------------------------------------------------------ what

    def run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        num_samples: int,
        seeds: Sequence[int],
    ) -> list[Measurement]:
        """Measures all combinations of role, step count, seed and metric; a collective."""
        started = time.monotonic()
        sampler = cast(FewStepSampler, pl_module)
        roles = self.roles or sampler.sampling_roles()[:1]
        found: list[Measurement] = []
        was_training = pl_module.training
        pl_module.eval()
        try:
            self._prepare(trainer, pl_module)
            for role in roles:
                for steps in self.num_steps or sampler.step_counts(role):
                    for seed in seeds:
                        found += self._measure(trainer, pl_module, role, steps, seed, num_samples)
        finally:
            pl_module.train(was_training)
        self.seconds += time.monotonic() - started
        self._report(trainer, pl_module, found)
        return found

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads feature networks and the reference, once."""
        if self._ready:
            return
        data = _reference_data(trainer)
        for metric in self.metrics:
            if trainer.is_global_zero:
                metric.prepare()
            trainer.strategy.barrier()
            metric.load(pl_module.device)
        conditions, samples = [], []
        for batch in data.reference_batches():
            samples.append(batch["sample"])
            conditions.append(batch["cond"])
        decode = cast(FewStepSampler, pl_module).decode
        for metric in self.metrics:
            metric.set_reference(decode(x.to(pl_module.device)) for x in samples)
        self._cond = {
            name: torch.cat([cond[name] for cond in conditions]) for name in conditions[0]
        }
        self._ready = True

    def _measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        role: str,
        num_steps: int,
        seed: int,
        num_samples: int,
    ) -> list[Measurement]:
        accumulators: list[Accumulator] = [metric.accumulate() for metric in self.metrics]
        for pixels in self._generate(trainer, pl_module, role, num_steps, seed, num_samples):
            for accumulator in accumulators:
                accumulator.update(pixels)
        gather = trainer.strategy.all_gather if trainer.world_size > 1 else None
        sampler = cast(FewStepSampler, pl_module)
        return [
            Measurement(
                metric=metric.name,
                value=accumulator.compute(gather),
                num_steps=num_steps,
                network_evaluations=sampler.sampling_evaluations(num_steps, role),
                guidance_scale=sampler.guidance_scale(role),
                role=role,
                num_samples=num_samples,
                seed=seed,
                protocol={
                    **metric.protocol(),
                    "reference": _reference_data(trainer).reference_protocol(),
                    "sample_shape": list(sampler.sample_shape),
                },
            )
            for metric, accumulator in zip(self.metrics, accumulators, strict=True)
        ]

    def _generate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        role: str,
        num_steps: int,
        seed: int,
        num_samples: int,
    ) -> Iterator[Tensor]:
        """This rank's share of the samples, decoded, a batch at a time."""
        sampler, device = cast(FewStepSampler, pl_module), pl_module.device
        starts = range(0, num_samples, self.batch_size)
        for number in range(trainer.global_rank, len(starts), trainer.world_size):
            size = min(self.batch_size, num_samples - starts[number])
            # Drawn on the CPU, so that the noise is the same on every kind of device.
            noise_source = torch_generator(seed, "evaluation-noise", number)
            noise = torch.randn(size, *sampler.sample_shape, generator=noise_source).to(device)
            generator = torch_generator(seed, "evaluation-sampler", number, device=device)
            x0 = sampler.sample(
                noise, self._cond_of(starts[number], size, device), num_steps, generator, role
            )
            yield sampler.decode(x0)

    def _cond_of(self, start: int, size: int, device: torch.device) -> Cond | None:
        """Conditions of the reference data, over and over."""
        if not self._cond:
            return None
        total = len(next(iter(self._cond.values())))
        rows = torch.arange(start, start + size) % total
        return {name: value[rows].to(device) for name, value in self._cond.items()}

    def _report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: list[Measurement]
    ) -> None:
        updates = trainer.global_step
        first_seed = [m for m in found if m.seed == found[0].seed]
        values = {f"eval/{m.metric}/{m.role}/{m.num_steps}_steps": m.value for m in first_seed}
        for logger in trainer.loggers:
            if trainer.state.fn == "fit":
                logger.log_metrics(values, step=updates)
        for role in dict.fromkeys(m.role for m in first_seed):
            for metric in dict.fromkeys(m.metric for m in first_seed):
                row = [m for m in first_seed if (m.role, m.metric) == (role, metric)]
                figures = "   ".join(f"{m.num_steps}: {m.value:.3g}" for m in row)
                say(trainer, f"{metric} of {role} at sampling steps   {figures}")


def _reference_data(trainer: pl.Trainer) -> ReferenceData:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ReferenceData):
        raise FewstepError(
            f"{type(data).__name__} has no reference_batches(), so there is nothing to measure "
            "against; remove the Evaluation callback or use one of fewstep's datamodules."
        )
    return data
