"""Diffusion mathematics: tensors in, tensors out; no config, no logging, no trainer."""

from fewstep.diffusion.analytic import AnalyticDenoiser, GaussianMixture
from fewstep.diffusion.ancestral import ancestral_times, variational_bound
from fewstep.diffusion.denoiser import Backbone, Cond, Denoiser, DenoiserLike, Guided
from fewstep.diffusion.phases import PhaseSchedule, TimeGrid
from fewstep.diffusion.prediction import Prediction, PredictionType, network_target, to_prediction
from fewstep.diffusion.samplers import (
    ancestral_sample,
    consistency_sample,
    ode_sample,
    one_step_sample,
    phased_sample,
    solver_step,
)
from fewstep.diffusion.schedules import FlowSchedule, Schedule, VPSchedule

__all__ = [
    "AnalyticDenoiser",
    "Backbone",
    "Cond",
    "Denoiser",
    "DenoiserLike",
    "FlowSchedule",
    "GaussianMixture",
    "Guided",
    "PhaseSchedule",
    "Prediction",
    "PredictionType",
    "Schedule",
    "TimeGrid",
    "VPSchedule",
    "ancestral_sample",
    "ancestral_times",
    "consistency_sample",
    "network_target",
    "ode_sample",
    "one_step_sample",
    "phased_sample",
    "solver_step",
    "to_prediction",
    "variational_bound",
]
