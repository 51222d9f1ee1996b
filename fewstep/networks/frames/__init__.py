"""The frame adversary of Motion Consistency Models: what judges single frames of a video."""

from fewstep.networks.frames.augment import NUM_UNIFORMS, DiffAugment, diff_augment
from fewstep.networks.frames.conditions import (
    ClassCondition,
    FrameCondition,
    PooledText,
    TextCondition,
)
from fewstep.networks.frames.features import (
    ConvolutionFeatures,
    DINOv2Features,
    FrozenFeatures,
)
from fewstep.networks.frames.heads import FrameDiscriminator

__all__ = [
    "NUM_UNIFORMS",
    "ClassCondition",
    "ConvolutionFeatures",
    "DINOv2Features",
    "DiffAugment",
    "FrameCondition",
    "FrameDiscriminator",
    "FrozenFeatures",
    "PooledText",
    "TextCondition",
    "diff_augment",
]
