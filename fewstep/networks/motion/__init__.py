"""What of a video's motion a student must match (Motion Consistency Model, Zhai et al. 2024).

A representation ``M`` of the student's and of the target's video are compared in place of the
videos, so that the student is free in whatever ``M`` leaves out. Videos are ``(B, C, F, H, W)``,
latents or pixels.
"""

from fewstep.networks.motion.base import FrameDifference, MotionRepresentation, RawMotion
from fewstep.networks.motion.correlation import GlobalCorrelation, LocalCorrelation
from fewstep.networks.motion.frequency import HighFrequency, LowFrequency
from fewstep.networks.motion.heads import HeavyLearnableHead, LearnableDifference, LearnableHead
from fewstep.networks.motion.statistics import COLLAPSED_VARIANCE, motion_statistics

__all__ = [
    "COLLAPSED_VARIANCE",
    "FrameDifference",
    "GlobalCorrelation",
    "HeavyLearnableHead",
    "HighFrequency",
    "LearnableDifference",
    "LearnableHead",
    "LocalCorrelation",
    "LowFrequency",
    "MotionRepresentation",
    "RawMotion",
    "motion_statistics",
]
