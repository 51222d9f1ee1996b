"""What all tests share: one thread, and a cache that no test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every machine, and no verdict on how busy it is.
settings.register_profile("fewstep", deadline=None, derandomize=True)
settings.load_profile("fewstep")
torch.set_num_threads(1)  # the tensors are small: more threads only wait for one another


@pytest.fixture(scope="session", autouse=True)
def fewstep_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this session's own, so that the digit classifier is trained at most once."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(cache))
        yield cache
