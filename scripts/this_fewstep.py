"""How another process runs the fewstep that is running."""

from __future__ import annotations

import sys
from pathlib import Path


def this_fewstep() -> list[str]:
    """Words that begin a command.

    Python, and the ranks that Lightning starts from it, do not look in the working folder first,
    where a user may have a package of his own that is called ``scripts`` or ``callbacks``: unless
    that folder is the checkout of fewstep that is running.
    """
    command = [sys.executable, "-m", "scripts.main"]
    if Path(__file__).resolve().parents[1] == Path.cwd().resolve():
        return command
    return ["env", "PYTHONSAFEPATH=1", *command]
