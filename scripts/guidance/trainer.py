"""A trainer whose one command is a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import nn

from callbacks import Evaluation, Samples
from fewstep.errors import FewstepError
from fewstep.guidance import Judge
from fewstep.guidance.freezing import modules_within
from fewstep.guidance.judge import refuse_guide_as_judge
from fewstep.guidance.knobs import Searched
from fewstep.metrics import Metric
from fewstep.metrics.fingerprints import shares_weights
from lightning_modules import FewStepModule
from lightning_modules.steering import Steering
from scripts.guidance.knobs import chosen_knobs, started
from scripts.guidance.overlay import Overlay
from scripts.guidance.searching import Search, SearchCallback
from scripts.trainer import FewstepTrainer


class SearchTrainer(FewstepTrainer):
    """Sets a run up as an evaluation does, and searches in its place.

    Attributes:
        model_config: how the configuration names the model and what guides it.
    """

    model_config: dict[str, Any]

    def search(
        self,
        model: FewStepModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        tuner: Judge | None = None,
        steps: list[int] | None = None,
        trials: int = 6,
        num_samples: int = 128,
        begin: float = 0.25,
        factor: float | None = None,
        knobs: str | None = None,
        max_distance: float | None = None,
        seed: int = 1000,
        name: str | None = None,
    ) -> None:
        """Tune the strength of training-free guidance by a tuner's word.

        Args:
            ckpt_path: Checkpoint file or run folder; the experiment's newest by default.
            tuner: Scores samples; neither the guide nor a judge of the results.
            steps: Sampling step counts; the score is the mean over them.
            trials: Settings to try.
            num_samples: Samples of each at each number of steps.
            begin: The first setting, as a multiple of the experiment's numbers.
            factor: By which the next is larger; 10 for smoothing.scale and 2 else by default.
            knobs: Fields of the guidance, with commas between; all strengths by default.
            max_distance: How much farther from data than unguided samples a winner's may be.
            seed: Seed of the noise.
            name: Folder of the search.
        """
        steering = _steering(model)
        guidance = cast(Searched, steering.guidance)
        tuner = self._checked_tuner(tuner, guidance)
        chosen = chosen_knobs(guidance, knobs, begin, factor, trials)
        counts = steps or model.step_counts()
        folder = name or "_".join(map(str, counts)) + "_steps"
        search = Search(
            steering=replace(steering, guidance=started(guidance, chosen, begin)),
            knobs=chosen,
            overlay=Overlay.of(self.model_config, [knob.field for knob in chosen]),
            tuner=tuner,
            steps=counts,
            trials=trials,
            samples=num_samples,
            max_distance=max_distance,
            seed=seed,
            folder=Path(self.default_root_dir).parent / "search" / folder,
        )
        measuring = (Evaluation, Samples)
        own = cast(Any, self)
        own.callbacks = [c for c in own.callbacks if not isinstance(c, measuring)]
        own.callbacks.append(SearchCallback(search))
        self._run_validation(model, datamodule, ckpt_path)

    def _checked_tuner(self, tuner: Judge | None, guidance: Searched) -> Judge:
        """The tuner, if it is neither guide nor judge."""
        if tuner is None:
            raise FewstepError(
                "A search needs a tuner to score samples by: give --tuner.class_path, such as "
                "fewstep.guidance.tuners.ClassTuner with --tuner.init_args.classifier, or put it "
                "into a search.yaml in the experiment's folder."
            )
        refuse_guide_as_judge(tuner, guidance.energy)
        for callback in cast(Any, self).callbacks:
            for metric in callback.metrics if isinstance(callback, Evaluation) else []:
                _refuse_judge(metric, list(modules_within(tuner)))
        return tuner


def _refuse_judge(metric: Metric, tuning: Sequence[nn.Module]) -> None:
    """Refuses a tuner that is a metric's judge.

    Raises:
        FewstepError: if they share a network.
    """
    if metric.needs_prompts and metric.features is not None and tuning:
        metric.features.load(torch.device("cpu"))  # a reader of captions, as the tuner may be
    for judge in metric.judges():
        if any(shares_weights(one, judge) for one in tuning):
            raise FewstepError(
                f"The tuner's {type(judge).__name__} is the judge of this experiment's "
                f"{type(metric).__name__}. A judge that chose a strength cannot measure what came "
                "of it: tune with a third network."
            )


def _steering(model: FewStepModule) -> Steering:
    """How the experiment steers.

    Raises:
        FewstepError: if it does not.
    """
    steering = None if model.steered is None else model.steered.steering
    if steering is None or steering.guidance is None:
        raise FewstepError(
            "This experiment has no guidance to search for. Give one that does, such as "
            "guidance/digits/few_polyak."
        )
    return steering
