"""Metrics of a set of samples against a reference, streaming and rank-independent."""

from fewstep.metrics.base import Accumulator, Features, Gather, Metric
from fewstep.metrics.digit_classifier import DigitClassifierFeatures
from fewstep.metrics.frechet import FrechetDistance, GaussianStatistics, frechet_distance
from fewstep.metrics.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein

__all__ = [
    "Accumulator",
    "DigitClassifierFeatures",
    "Features",
    "FrechetDistance",
    "Gather",
    "GaussianStatistics",
    "Metric",
    "SlicedWasserstein",
    "frechet_distance",
    "sliced_wasserstein",
]
