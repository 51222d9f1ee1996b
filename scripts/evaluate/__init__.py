"""What ``fewstep evaluate`` can measure besides this project's own checkpoints."""

from scripts.evaluate.finished import FinishedSamples
from scripts.evaluate.pipelines import PipelineSampler

__all__ = ["FinishedSamples", "PipelineSampler"]
