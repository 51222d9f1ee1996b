"""``fewstep guidance``: equal-effort tuning of training-free guidance."""

from scripts.guidance.command import main

__all__ = ["main"]
