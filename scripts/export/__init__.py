"""``fewstep export``: a trained student as a plain diffusers pipeline."""

from scripts.export.command import main

__all__ = ["main"]
