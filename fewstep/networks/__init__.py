"""Backbones behind one face, discriminators, weight averaging and the loading of trained ones."""

from fewstep.networks.discriminator import FeatureDiscriminator
from fewstep.networks.dit import DiT
from fewstep.networks.ema import ema_update, warmed_up_decay
from fewstep.networks.loading import LoadedDenoiser, find_checkpoint, load_denoiser
from fewstep.networks.mixture import RingMixture, ring
from fewstep.networks.motion.base import FrameDifference, MotionRepresentation, RawMotion
from fewstep.networks.motion.correlation import GlobalCorrelation, LocalCorrelation
from fewstep.networks.motion.frequency import HighFrequency, LowFrequency
from fewstep.networks.motion.heads import HeavyLearnableHead, LearnableDifference, LearnableHead
from fewstep.networks.motion.statistics import COLLAPSED_VARIANCE, motion_statistics
from fewstep.networks.video_dit import VideoDiT

__all__ = [
    "COLLAPSED_VARIANCE",
    "DiT",
    "FeatureDiscriminator",
    "FrameDifference",
    "GlobalCorrelation",
    "HeavyLearnableHead",
    "HighFrequency",
    "LearnableDifference",
    "LearnableHead",
    "LoadedDenoiser",
    "LocalCorrelation",
    "LowFrequency",
    "MotionRepresentation",
    "RawMotion",
    "RingMixture",
    "VideoDiT",
    "ema_update",
    "find_checkpoint",
    "load_denoiser",
    "motion_statistics",
    "ring",
    "warmed_up_decay",
]
