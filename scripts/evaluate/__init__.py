"""What can be measured and drawn besides this project's own checkpoints."""

from scripts.evaluate.finished import FinishedSamples
from scripts.evaluate.given_noise import DrawnPipeline, exported_steps
from scripts.evaluate.pipelines import PipelineSampler

__all__ = ["DrawnPipeline", "FinishedSamples", "PipelineSampler", "exported_steps"]
