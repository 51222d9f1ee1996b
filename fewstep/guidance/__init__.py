"""Training-free guidance: any denoiser steered by the gradient of a loss of clean samples."""

from fewstep.guidance.augmentors import Augmentor, DiffAugment, Identity
from fewstep.guidance.energies import ClassLabel, Energy, LinearMeasurement, MixtureLikelihood
from fewstep.guidance.guidance import Guidance, Recurrence, Window
from fewstep.guidance.methods import (
    augmented_polyak,
    dps,
    freedom,
    lgd_mc,
    mpgd,
    tfg,
    universal,
)
from fewstep.guidance.operators import (
    Blur,
    Downsample,
    HiddenBox,
    HiddenPixels,
    LinearOperator,
    Matrix,
)
from fewstep.guidance.rules import (
    AdamMoments,
    Capped,
    FreeDoMRms,
    Normalised,
    Polyak,
    Scheduled,
    Signal,
    StepRule,
)
from fewstep.guidance.sampler import GuidedSamples, guided_sample, own_stream
from fewstep.guidance.smoothing import Objective, Smoothing
from fewstep.guidance.steps import DDIM, BaseStep, FixedShare, Step, plan_steps
from fewstep.guidance.trace import Costs, Trace

__all__ = [
    "DDIM",
    "AdamMoments",
    "Augmentor",
    "BaseStep",
    "Blur",
    "Capped",
    "ClassLabel",
    "Costs",
    "DiffAugment",
    "Downsample",
    "Energy",
    "FixedShare",
    "FreeDoMRms",
    "Guidance",
    "GuidedSamples",
    "HiddenBox",
    "HiddenPixels",
    "Identity",
    "LinearMeasurement",
    "LinearOperator",
    "Matrix",
    "MixtureLikelihood",
    "Normalised",
    "Objective",
    "Polyak",
    "Recurrence",
    "Scheduled",
    "Signal",
    "Smoothing",
    "Step",
    "StepRule",
    "Trace",
    "Window",
    "augmented_polyak",
    "dps",
    "freedom",
    "guided_sample",
    "lgd_mc",
    "mpgd",
    "own_stream",
    "plan_steps",
    "tfg",
    "universal",
]
