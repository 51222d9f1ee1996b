"""Bringing shards in ahead of their use."""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress
from pathlib import Path

from datamodules.sources.addresses import shown
from datamodules.sources.cache import BusyError, ShardCache
from datamodules.sources.remote import PerProcess
from fewstep.errors import FewstepError

logger = logging.getLogger(__name__)
THREADS = 2


class _Prefetcher:
    """A few threads that bring shards in; they die with the process rather than delay its end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pending: set[Path] = set()
        self.tasks: queue.SimpleQueue[tuple[ShardCache, str, str]] = queue.SimpleQueue()
        self.threads = 0

    def add(self, cache: ShardCache, address: str, name: str) -> None:
        copy = cache.root / "shards" / name
        with self.lock:
            if copy in self.pending or copy.exists():
                return
            self.pending.add(copy)
            while self.threads < THREADS:
                threading.Thread(target=self._work, name="prefetch", daemon=True).start()
                self.threads += 1
        self.tasks.put((cache, address, name))

    def _work(self) -> None:
        while True:
            cache, address, name = self.tasks.get()
            try:
                cache.shard(address, name, wait=False)
            except BusyError:
                pass  # another process brings it, or the cache is full of what is on its way
            except Exception as error:
                logger.debug("Prefetching '%s' failed: %s", shown(address), error)
            finally:
                with self.lock:
                    self.pending.discard(cache.root / "shards" / name)


_prefetcher = PerProcess(_Prefetcher)


def prefetch(cache: ShardCache, address: str, name: str) -> None:
    """Begins to bring a shard in, in the background, unless it is here or on its way."""
    # Packages are imported here, not in a thread: a fork amid an import would lock them for ever.
    with suppress(FewstepError):
        cache.remote.filesystem(address)
    _prefetcher.value.add(cache, address, name)
