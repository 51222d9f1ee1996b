"""``fewstep gates``: learnable gates on the residual branches of a pipeline's network."""

from scripts.gates.command import main

__all__ = ["main"]
