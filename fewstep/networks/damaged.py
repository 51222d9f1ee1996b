"""Files that should be checkpoints, and are none."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from fewstep.errors import FewstepError

# What torch raises for files that are cut short, of another format, or hold other than tensors.
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
    CheckpointException,
)


def damaged(path: str | Path) -> FewstepError:
    """What to say of such a file."""
    return FewstepError(
        f"'{path}' is no checkpoint, or is damaged. Give another, such as an earlier one of the "
        "run's checkpoints/."
    )


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Explains what goes wrong while a checkpoint is read, and nothing else is done.

    Raises:
        FewstepError: naming the file, instead of torch's advice to run whatever code it holds.
    """
    try:
        yield
    except OSError as error:
        if error.errno == EINVAL:  # torch has looked for a part past the end of the file
            raise damaged(path) from error
        raise FewstepError(f"The checkpoint '{path}' cannot be read: {error}.") from error
    except UNREADABLE as error:
        if "Unsupported global" in str(error):
            raise FewstepError(
                f"'{path}' holds more than plain tensors, and loading that could run any code. "
                "Give a checkpoint of a run's checkpoints/."
            ) from error
        raise damaged(path) from error
