"""The levels a diffusers scheduler steps through, as a network inside its pipeline meets them.

A network never sees variance-exploding states: schedulers with sigmas above 1 (Euler, Heun) scale
its input back to ``alpha^2 + sigma^2 = 1``, so there are two cases only, variance preserving and
flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import PredictionType
from fewstep.errors import FewstepError
from fewstep.guidance.steps import DDIM, Step, steps_between

END = -1.0  # time of the last step's end, which nothing asks for
NEAREST = 4e-3  # relative; half-precision pipelines round the times they give their network


class SchedulerSteps:
    """The steps of a scheduler's run, in variance-preserving coordinates.

    A scheduler counts its own steps, and where it is follows from that number alone: to compare the
    times that a network is told would wait for the device, and half precision rounds them.

    Args:
        scheduler: of a diffusers pipeline, after ``set_timesteps``.

    Attributes:
        prediction_type: what its network predicts.

    Raises:
        FewstepError: if the scheduler has no such levels or clips samples, or no run has begun.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        flow = "shift" in config or bool(config.get("use_flow_sigmas"))
        if getattr(scheduler, "num_inference_steps", None) is None:
            raise FewstepError(
                "The network was called outside a run of its pipeline, whose scheduler says how "
                "noisy samples are. Call the pipeline itself, with num_inference_steps."
            )
        if not flow and getattr(scheduler, "alphas_cumprod", None) is None:
            raise _unknown(scheduler)
        _refuse_clipping(scheduler)
        self.prediction_type: PredictionType = "flow_prediction" if flow else _prediction(scheduler)
        times = scheduler.timesteps.detach().double().cpu()
        levels = _ratios(scheduler, times) if flow or _has_sigmas(scheduler) else None
        if levels is not None:
            sigma = levels if flow else levels / (1 + levels.square()).sqrt()
            alpha = 1 - levels if flow else 1 / (1 + levels.square()).sqrt()
        else:
            alpha, sigma = _discrete(scheduler, times)
        # Solvers of second order come by a time twice; it is one step here.
        first = torch.cat([torch.tensor([True]), times.diff() != 0, torch.tensor([True])])
        grid = torch.cat([times, torch.tensor([END]).double()])
        self.steps: list[Step] = steps_between(grid[first], alpha[first], sigma[first], DDIM())
        self._times: list[float] = times.tolist()
        self._begin: int | None = getattr(scheduler, "begin_index", None)
        self._places: list[int] = (first[:-1].cumsum(0) - 1).tolist()

    def first(self, t: float) -> int:
        """The number of the scheduler's own step with which a run begins, from 0.

        Args:
            t: what the network is told in its first call; where a picture is given, a run begins
                at a later one.

        Raises:
            FewstepError: if no step begins at that time.
        """
        number = min(range(len(self._times)), key=lambda n: abs(self._times[n] - t))
        if self._begin is not None and self._times[self._begin] == self._times[number]:
            number = self._begin  # of a time that comes twice, the one the pipeline means
        nearest = self._times[number]
        if abs(nearest - t) > NEAREST * max(abs(t), 1):
            raise FewstepError(
                f"The network was called at t = {t:g}, and the pipeline's scheduler has no such "
                f"time; the nearest is {nearest:g}. Is the scheduler another pipeline's?"
            )
        return number

    def at(self, number: int) -> Step:
        """The step that the scheduler's own step of a number belongs to.

        Raises:
            FewstepError: if there are no more.
        """
        if number >= len(self._places):
            raise FewstepError(
                f"The pipeline goes on after all {len(self._places)} steps of its scheduler. Guide "
                "a pipeline that sets the times of each run with set_timesteps."
            )
        return self.steps[self._places[number]]


def _refuse_clipping(scheduler: Any) -> None:
    """What is clipped loses its shift, and DDIM, whose noise keeps it, then steps the wrong way."""
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option):
            name = type(scheduler).__name__
            raise FewstepError(
                f"The pipeline's {name} clips clean samples ({option}), and guidance is lost or "
                "turned round where it does. Set pipe.scheduler = "
                f"{name}.from_config(pipe.scheduler.config, {option}=False)."
            )


def _unknown(scheduler: Any) -> FewstepError:
    return FewstepError(
        f"A {type(scheduler).__name__} has levels of its own, which guidance of pipelines does not "
        "know. Use DDIM, DPM-Solver, UniPC, Euler or Heun schedulers, or those of flow matching."
    )


def _prediction(scheduler: Any) -> PredictionType:
    found = scheduler.config.get("prediction_type", "epsilon")
    if found not in ("epsilon", "v_prediction", "sample"):
        raise _unknown(scheduler)
    return found


def _has_sigmas(scheduler: Any) -> bool:
    return isinstance(getattr(scheduler, "sigmas", None), Tensor)


def _ratios(scheduler: Any, times: Tensor) -> Tensor:
    """The scheduler's sigmas ``(T + 1,)``: noise to signal, or of a flow the noise level."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or len(sigmas) != len(times) + 1:
        raise _unknown(scheduler)
    return sigmas.detach().double().cpu()


def _discrete(scheduler: Any, times: Tensor) -> tuple[Tensor, Tensor]:
    """Levels ``(T + 1,)`` of schedulers that go by the train index."""
    table = scheduler.alphas_cumprod.detach().double().cpu()
    last = getattr(scheduler, "final_alpha_cumprod", None)
    end = torch.ones(1).double() if last is None else torch.as_tensor(last).double().reshape(1)
    alpha_bar = torch.cat([table[times.long()], end])
    return alpha_bar.sqrt(), (1 - alpha_bar).clamp_min(0).sqrt()
