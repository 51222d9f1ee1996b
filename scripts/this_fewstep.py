"""How another process runs the fewstep that is running."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution


def this_fewstep() -> list[str]:
    """Words that begin a command.

    With -P, Python does not look in the working folder first, where a user may have a package of
    his own that is called ``scripts`` or ``callbacks``.
    """
    try:
        distribution("fewstep")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return [sys.executable, "-m", "scripts.main"]
    return [sys.executable, "-P", "-m", "scripts.main"]
