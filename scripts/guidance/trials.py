"""One trial of a search: samples with a setting of the guidance, and what a tuner says of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from callbacks.generation import Cell, Scene
from callbacks.reference_sets import ReferenceSets
from fewstep.errors import FewstepError
from fewstep.guidance import Bench, Costs, GuidedSamples, Judge, Trace, Trial
from fewstep.guidance.energies import Target
from fewstep.guidance.knobs import Searched
from fewstep.guidance.tuners import EnergyTuner
from fewstep.metrics import NearestDataDistance, ReferenceStore
from lightning_modules.steered_roles import SteeredRoles
from lightning_modules.steering import Steering
from scripts.guidance.records import Look, Records


class Enough(Exception):  # noqa: N818  (it is no error)
    """As many settings were tried as were asked for."""


class Tuning:
    """Draws and scores samples, from the same noise for every setting.

    Args:
        scene: who samples, and the data.
        steering: whose guidance is changed.
        steps: numbers of steps to sample in.
        samples: at each of them.
        seed: of the noise.
    """

    def __init__(
        self,
        scene: Scene,
        steering: Steering,
        tuner: Judge,
        steps: Sequence[int],
        samples: int,
        seed: int,
    ) -> None:
        self.scene, self.steering, self.tuner = scene, steering, tuner
        self.steps, self.samples, self.seed = steps, samples, seed
        self.looks: list[Look] = []
        self.measures_distance = False
        self._metric = NearestDataDistance(most=4096)
        self._references = ReferenceSets([self._metric], ReferenceStore(None), 1, samples)

    @property
    def module(self) -> SteeredRoles:
        """The method that samples."""
        return cast(SteeredRoles, self.scene.module)

    def target(self) -> Target:
        """What the tuner is told of each sample at one number of steps, ``(N, ...)``."""
        wanted = self.scene.data.reference_conditions(range(self.samples))
        if self.steering.target == "prompt" and isinstance(self.tuner, EnergyTuner):
            return self.tuner.encode(wanted.prompt or []).to(self.module.device)
        if self.steering.pictures and self.steering.target is not None:
            pictures = wanted.cond[self.steering.target].to(self.module.device)
            return self.tuner.see(pictures) if isinstance(self.tuner, EnergyTuner) else pictures
        found = self.steering.target_of(wanted.cond, wanted.prompt)
        return None if found is None else found.to(self.module.device)

    def targets(self) -> Target:
        """The same, of the samples at all numbers of steps."""
        once = self.target()
        return torch.cat([once] * len(self.steps)) if isinstance(once, Tensor) else once

    def draw(self, guidance: Searched | None) -> GuidedSamples:
        """Samples at all numbers of steps; how each did is in :attr:`looks` then.

        Raises:
            FewstepError: if guidance diverged.
        """
        plain = replace(self.steering, guidance=None, candidates=1)
        steering = plain if guidance is None else replace(self.steering, guidance=guidance)
        self.module.steer(steering)
        role, target = self.module.sampling_roles()[0], self.target()
        pieces: list[Tensor] = []
        costs, self.looks = Costs(0, 0, 0), []
        for steps in self.steps:
            cell = Cell(role, steps, self.seed)
            batches = list(self.scene.generated(cell, self.samples))
            (own,) = self.scene.collected([self._metric], batches, cell.described())
            pieces.append(torch.cat([batch.pixels for batch in batches]))
            score = float(self.tuner(pieces[-1], target).double().mean())
            distance = None
            if self.measures_distance:
                (data,) = self._references.statistics(self.scene, "data")
                distance = self._metric.compute(own, data)["nearest_data_ratio"]
            self.looks.append(Look(steps, score, distance))
            costs = costs + _costs(self.module.sampling_cost(steps, role), self.samples)
        none = torch.empty(0, sum(map(len, pieces)))
        finished = torch.ones(none.shape[1], dtype=torch.bool)
        trace = Trace((), none, none, none, none, none, finished, costs)
        return GuidedSamples(torch.cat(pieces), trace)


def _costs(counted: dict[str, float], samples: int) -> Costs:
    """Costs of a sample, and the seconds of all."""
    names = ("denoiser_evaluations", "denoiser_gradients", "energy_evaluations")
    evaluations, gradients, energies = (int(counted[name]) for name in names)
    return Costs(evaluations, gradients, energies, counted["seconds"] * samples)


class Trials:
    """Tries settings, writes each down, and refuses those that leave the data.

    Args:
        tuning: draws and scores.
        records: of the trials so far, and where new ones go.
        max_distance: how many times farther from data than unguided samples those of a setting may
            be, at every number of steps, to win; None lets all.
        most: after so many, known ones included, a new one raises :class:`Enough`.
    """

    def __init__(
        self, tuning: Tuning, records: Records, max_distance: float | None, most: int
    ) -> None:
        self.tuning, self.records = tuning, records
        self.max_distance, self.most = max_distance, most
        tuning.measures_distance = max_distance is not None

    @contextmanager
    def bench(self) -> Iterator[Bench]:
        """How a search tries a setting; samples without guidance come first, if they are new."""
        with tqdm(
            total=self.most,
            initial=min(len(self.records.trials), self.most),
            desc="searching",
            unit="trial",
            leave=False,
            disable=not sys.stderr.isatty(),
        ) as bar:
            if self.records.unguided is None:
                self.tuning.draw(None)
                self.records.add_unguided(self.tuning.looks)

            def note(trial: Trial) -> None:
                self.records.add(trial, self.tuning.looks)
                bar.update()

            yield Bench(self._sample, self.tuning.tuner, self.tuning.targets(), note)

    def _sample(self, guidance: Searched) -> GuidedSamples:
        """Samples that a tuner may score.

        Raises:
            FewstepError: if they are too far from data, or guidance diverged: the trial failed.
            Enough: if there were trials enough.
        """
        if len(self.records.trials) >= self.most:
            raise Enough
        found = self.tuning.draw(guidance)
        for look, plain in zip(self.tuning.looks, self.records.unguided or [], strict=True):
            if self.max_distance is None or look.distance is None or plain.distance is None:
                continue
            if look.distance > self.max_distance * plain.distance:
                raise FewstepError(
                    f"at {look.num_steps} steps {look.distance / plain.distance:.3g} times as far "
                    f"from data as unguided samples; the bound is {self.max_distance:g}"
                )
        return found
