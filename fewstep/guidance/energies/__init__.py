"""Energies: how far clean samples are from what is wanted, one loss for each sample."""

from fewstep.guidance.energies.base import Energy, Target, safe_norm
from fewstep.guidance.energies.clip import CLIPDistance, CLIPStyle
from fewstep.guidance.energies.closed_forms import LinearMeasurement, MixtureLikelihood
from fewstep.guidance.energies.decoded import Decoded, Decoder
from fewstep.guidance.energies.distances import EmbeddingDistance, MapDistance
from fewstep.guidance.energies.labels import ClassLabel, Reward
from fewstep.guidance.energies.motion import FinalPosition, InkCentres, ObstacleAvoidance, Positions
from fewstep.guidance.energies.pictures import (
    PictureNetwork,
    PretrainedClassifier,
    load_network,
    with_weights,
)
from fewstep.guidance.energies.sums import EachFrame, Sum

__all__ = [
    "CLIPDistance",
    "CLIPStyle",
    "ClassLabel",
    "Decoded",
    "Decoder",
    "EachFrame",
    "EmbeddingDistance",
    "Energy",
    "FinalPosition",
    "InkCentres",
    "LinearMeasurement",
    "MapDistance",
    "MixtureLikelihood",
    "ObstacleAvoidance",
    "PictureNetwork",
    "Positions",
    "PretrainedClassifier",
    "Reward",
    "Sum",
    "Target",
    "load_network",
    "safe_norm",
    "with_weights",
]
