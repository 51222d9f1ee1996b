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
        self.visits = [int((times == step.t).sum()) for step in self.steps]

    def at(self, t: float) -> Step:
        """The step that begins at the time a network is called with.

        Raises:
            FewstepError: if none does.
        """
        nearest = min(self.steps, key=lambda step: abs(step.t - t))
        if abs(nearest.t - t) > NEAREST * max(abs(t), 1):
            raise FewstepError(
                f"The network was called at t = {t:g}, and the pipeline's scheduler has no such "
                f"time; the nearest is {nearest.t:g}. Is the scheduler another pipeline's?"
            )
        return nearest


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
