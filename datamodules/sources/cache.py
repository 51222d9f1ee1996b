"""Copies of remote shards in a bounded folder that all processes of a machine share.

Below the root, ``shards/`` holds the copies and ``companions/`` their side-cars; a file under its
final name is always whole. ``locks/`` holds an empty file for each shard, locked by whoever brings
it in, and one for whoever makes room. Locks vanish with their holder, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datamodules.sources.addresses import shown
from datamodules.sources.faults import TruncatedError, patiently
from datamodules.sources.remote import Remote
from fewstep.errors import FewstepError

logger = logging.getLogger(__name__)
GIB = 2**30
PARTIAL = ".partial-"
WAIT_FOR_ROOM = 0.1  # seconds between looks whether there is room


class BusyError(Exception):
    """Bringing a shard in would mean to wait for another process."""


class ShardCache:
    """Brings shards in, once however many ask, and removes the least recently used for them.

    Args:
        root: the folder.
        cache_gib: how much the copies and what is on its way may take together.
        remote: opens the files.
    """

    def __init__(self, root: Path, cache_gib: float, remote: Remote) -> None:
        self.root = root
        self.cache_gib = cache_gib
        self.remote = remote

    def shard(self, address: str, name: str, wait: bool = True) -> Path:
        """The copy of a shard, brought in if it is not there; it counts as just used.

        Args:
            address: of the shard.
            name: of the copy.
            wait: whether to wait for another process that brings it in, and for room.

        Raises:
            FewstepError: if it cannot be brought in.
            BusyError: if that would mean to wait and ``wait`` is False.
        """
        copy = self.root / "shards" / name
        if not _touch(copy):
            with self._lock(name, wait) as held:
                if not held:
                    raise BusyError
                if not _touch(copy):  # or another process brought it while we waited
                    self._bring(address, copy, lambda part, size: self._reserve(part, size, wait))
        return copy

    def companion(self, address: str, name: str) -> Path:
        """The copy of a small file, which is never removed.

        Raises:
            FewstepError: if it cannot be brought in; MissingError if there is none.
        """
        copy = self.root / "companions" / name
        if not copy.exists():
            with self._lock(name, wait=True):
                if not copy.exists():
                    self._bring(address, copy, _allocate)
        return copy

    # ------------------------------------------------------------------ bringing in

    def _bring(self, address: str, copy: Path, reserve: Callable[[Path, int], None]) -> None:
        with self._writing():
            copy.parent.mkdir(parents=True, exist_ok=True)
            for stale in copy.parent.glob(
                f"{copy.name}{PARTIAL}*"
            ):  # the lock is ours, so they are
                stale.unlink(missing_ok=True)
        partial = copy.with_name(f"{copy.name}{PARTIAL}{os.getpid()}")
        download = _Download(self, address, partial, reserve)
        try:
            patiently(address, download.attempt, self.remote.patience, lambda: download.position)
            with self._writing():
                partial.replace(copy)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Faults of our own disk are no faults of the server."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "lower data.init_args.cache_gib or set" if full else "set"
            raise FewstepError(
                f"Cannot write to the cache folder '{self.root}': {error}. Please {remedy} "
                "data.init_args.cache (or FEWSTEP_CACHE) to a folder on a disk with room."
            ) from error

    # ------------------------------------------------------------------ room

    def _reserve(self, partial: Path, size: int, wait: bool) -> None:
        """Makes ``partial`` as long as it will be, so that others see the room as taken."""
        if size > self.cache_gib * GIB:
            raise FewstepError(
                f"A shard of {size / GIB:,.3g} GiB is larger than the whole cache of "
                f"{self.cache_gib:g} GiB; raise data.init_args.cache_gib."
            )
        while True:
            with self._lock("room", wait=True), self._writing():
                if self._make_room(partial, size):
                    _allocate(partial, size)
                    return
            if not wait:
                raise BusyError
            time.sleep(WAIT_FOR_ROOM)  # what others are bringing in can be removed once it is there

    def _make_room(self, partial: Path, size: int) -> bool:
        """Removes copies until ``size`` fits; False if what others bring in leaves too little."""
        copies: list[tuple[int, int, Path]] = []
        room = int(self.cache_gib * GIB) - size
        for path in partial.parent.iterdir():
            with suppress(FileNotFoundError):
                about = path.stat()
                if PARTIAL not in path.name:
                    copies.append((about.st_mtime_ns, about.st_size, path))
                elif path != partial and not self._removed_stale(path):
                    room -= about.st_size
        if room < 0:
            return False
        room -= sum(taken for _, taken, _ in copies)
        for _, taken, path in sorted(copies):
            if room >= 0:
                break
            path.unlink(missing_ok=True)  # who has it open keeps it
            room += taken
        return True

    def _removed_stale(self, partial: Path) -> bool:
        """Removes what a killed process left: nobody holds its lock."""
        with self._lock(partial.name.rpartition(PARTIAL)[0], wait=False) as held:
            if held:
                partial.unlink(missing_ok=True)
            return held

    # ------------------------------------------------------------------ locks

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Holds a lock of the machine's processes and threads; yields whether it is ours."""
        path = self.root / "locks" / name
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(descriptor)
        try:
            held = self._acquired(descriptor, wait)
            try:
                yield held
            finally:
                # Not left to close(): a child forked meanwhile has this descriptor too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            _locks.discard(descriptor)
            os.close(descriptor)

    def _acquired(self, descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            raise FewstepError(
                f"The cache folder '{self.root}' is on a disk without file locks ({error}); set "
                "data.init_args.cache (or FEWSTEP_CACHE) to a folder on a local disk."
            ) from error
        return True


class _Download:
    """One file on its way; a new attempt goes on where the last one broke off, if it can."""

    def __init__(
        self, cache: ShardCache, address: str, partial: Path, reserve: Callable[[Path, int], None]
    ) -> None:
        self.cache, self.address, self.partial, self.reserve = cache, address, partial, reserve
        self.position = 0
        self.version: str | None = None

    def attempt(self) -> None:
        """Writes what is missing."""
        with self.cache.remote.open(self.address, self.position, self.version) as body:
            self.position, self.version = body.start, body.version
            self.reserve(self.partial, body.size)
            with self.cache._writing():
                descriptor = os.open(self.partial, os.O_WRONLY)
            try:
                for chunk in body.chunks:
                    self._write(descriptor, chunk)
                with self.cache._writing():
                    os.fsync(descriptor)  # the name must not reach the disk before the bytes
            finally:
                os.close(descriptor)
        if self.position != body.size:
            raise TruncatedError(f"{self.position:,} of {body.size:,} bytes arrived")
        logger.debug("Brought in '%s', %d bytes.", shown(self.address), body.size)

    def _write(self, descriptor: int, chunk: bytes) -> None:
        view = memoryview(chunk)
        with self.cache._writing():
            while view:
                written = os.pwrite(descriptor, view, self.position)
                self.position += written
                view = view[written:]


_locks: set[int] = set()


def _let_go() -> None:
    """Closes what a fork copied, or a lock would outlive a parent that is killed."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def _allocate(partial: Path, size: int) -> None:
    """Gives a file its final length; the blocks come as they are written."""
    with partial.open("ab") as file:
        file.truncate(size)


def _touch(copy: Path) -> bool:
    """Marks a copy as just used; False if there is none."""
    try:
        os.utime(copy)  # not the access time, which many disks do not keep
    except FileNotFoundError:
        return False
    except OSError:
        return copy.exists()  # a cache that others filled and we only read
    return True
