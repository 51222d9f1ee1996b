"""What a pipeline's scheduler says of how its network was trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedules import FlowSchedule, Schedule, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks.folders import part_of, read_json

logger = logging.getLogger(__name__)


def read_schedule(folder: Path, num_tokens: int) -> tuple[Schedule, PredictionType]:
    """The noise schedule and prediction type of a pipeline, from its scheduler's configuration.

    Variance-preserving trajectories end at train index 0 where the scheduler says
    ``set_alpha_to_one: false``, else at clean data; flows end at clean data.

    Args:
        num_tokens: tokens the network makes of a sample, on which a dynamic shift depends.

    Raises:
        FewstepError: if the scheduler is missing, or of a kind that has no such schedule.
    """
    given = read_json(folder / part_of(folder, "scheduler") / "scheduler_config.json")
    cls = getattr(diffusers, str(given.get("_class_name")), None)
    if cls is None:
        raise FewstepError(
            f"The pipeline '{folder}' has a scheduler '{given.get('_class_name')}', which this "
            f"version of diffusers ({diffusers.__version__}) does not know."
        )
    # Built once, so that what the file leaves out gets the scheduler's own defaults.
    scheduler = cls.from_config(given)
    config = {**given, **scheduler.config}
    if "shift" in config or config.get("use_flow_sigmas"):
        return FlowSchedule(flow_shift(config, num_tokens)), "flow_prediction"
    if "beta_schedule" not in config:
        raise FewstepError(
            f"The scheduler of '{folder}', {given['_class_name']}, has neither betas nor a flow."
        )
    end = "clean" if config.get("set_alpha_to_one", True) else "first_index"
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise FewstepError(
            f"The scheduler of '{folder}' says prediction_type '{prediction}', which is unknown."
        )
    return VPSchedule.from_diffusers(scheduler, end), prediction  # type: ignore[arg-type]


def warn_of_other_betas(folder: Path, expected: str | None) -> None:
    """Says so if a pipeline's scheduler has other betas than its network was trained with."""
    config = read_json(folder / part_of(folder, "scheduler") / "scheduler_config.json")
    found = config.get("beta_schedule", expected)
    if expected is not None and found != expected:
        logger.warning(
            "The scheduler of '%s' says beta_schedule '%s', but networks of this family are "
            "trained with '%s'. Unless yours was not, save the pipeline with the right one first: "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, "
            "beta_schedule='%s').",
            folder,
            found,
            expected,
            expected,
        )


def flow_shift(config: Mapping[str, Any], num_tokens: int) -> float:
    """The shift ``s`` of ``sigma = s u / (1 + (s - 1) u)`` (:class:`FlowSchedule`).

    A dynamic shift (FLUX, LTX-Video) grows with the number of tokens: ``s = exp(mu)`` with ``mu``
    linear in it. What is taken is its value for samples of the denoiser's shape. A scheduler's
    further bending of the grid of steps (``shift_terminal``) is no part of the network's schedule.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (num_tokens - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
