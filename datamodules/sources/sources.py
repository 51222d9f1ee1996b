"""Where shards come from: local folders, and http(s), s3, gs and hf addresses behind a cache.

There is no shell here: an address is a path or one of the schemes below, and nothing else.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import braceexpand

from datamodules.sources.addresses import LOCAL_SCHEMES, identity, plain, scheme_of, shown
from datamodules.sources.cache import ShardCache
from datamodules.sources.faults import DeniedError, MissingError, Patience
from datamodules.sources.prefetch import prefetch
from datamodules.sources.remote import Remote
from fewstep.errors import FewstepError

logger = logging.getLogger(__name__)
REMEDY = "Set data.init_args.shards (and val_shards) to your .tar files."
NAMED = 5  # entries of a folder that a message names


class Sources:
    """Finds shards and brings them near; safe to share between threads and processes.

    Args:
        cache: folder for copies of remote shards; by default ``shards`` below ``$FEWSTEP_CACHE`` or
            ``~/.cache/fewstep``. All processes of a machine may share it.
        cache_gib: GiB the copies may take; the least recently used make room.
        attempts: tries in a row that may fail at a remote file before giving up.
        storage_options: options of fsspec's file systems by protocol, for example
            ``{"s3": {"endpoint_url": ...}, "gs": {"token": "anon"}}``.

    Raises:
        FewstepError: if an argument is out of range, or ``storage_options`` name no protocol.
    """

    def __init__(
        self,
        cache: str | None = None,
        cache_gib: float = 100.0,
        attempts: int = 6,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if cache_gib <= 0 or attempts < 1:
            raise FewstepError(
                f"cache_gib must be above 0 and attempts at least 1, not {cache_gib} and {attempts}"
            )
        base = os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep"
        self.root = (Path(cache) if cache else Path(base, "shards")).expanduser().absolute()
        self.patience = Patience(attempts)
        self.remote = Remote(storage_options, self.patience)
        self.cache = ShardCache(self.root, cache_gib, self.remote)

    # ------------------------------------------------------------------ names

    def expand(self, patterns: str | Sequence[str]) -> list[str]:
        """The shards that patterns stand for.

        A pattern may have braces, ``part-{000..127}.tar``; globs, except at http; or be a folder
        (remote: an address that ends with ``/``), which stands for all its ``*.tar``. The shards of
        a pattern are in alphabetical order, so that it does not matter how they are written.
        Remote files named in full are not looked up.

        Raises:
            FewstepError: if the scheme is not allowed, if a pattern matches nothing, or if a shard
                is named twice, since it would then be seen twice an epoch.
        """
        listed = [patterns] if isinstance(patterns, str) else list(patterns)
        if not listed:
            raise FewstepError(f"No shards are named. {REMEDY}")
        found = [shard for pattern in listed for shard in self._expand(pattern)]
        counts = Counter(map(identity, found))
        twice = [shard for shard in found if counts[identity(shard)] > 1]
        if twice:
            raise FewstepError(
                f"The shard '{shown(twice[0])}' is named twice and would be seen twice an epoch; "
                "remove it from one of the patterns."
            )
        return found

    def is_local(self, address: str) -> bool:
        """Whether the address is a file of this machine.

        Raises:
            FewstepError: if its scheme is not allowed.
        """
        return scheme_of(address) in LOCAL_SCHEMES

    def _expand(self, pattern: str) -> list[str]:
        if self.is_local(pattern) and Path(plain(pattern)).exists():
            return self._local_matches(plain(pattern))  # even if its name has braces
        try:
            alternatives = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise FewstepError(f"The braces of '{shown(pattern)}' do not match: {error}") from error
        found: list[str] = []
        for one in alternatives:
            scheme = scheme_of(one)  # braces may have hidden it
            found += (
                self._local_matches(plain(one))
                if scheme in LOCAL_SCHEMES
                else (self._remote_matches(one))
            )
        return sorted(found)

    def _local_matches(self, pattern: str) -> list[str]:
        path = Path(pattern)
        if path.is_dir():
            return _some(sorted(str(p) for p in path.glob("*.tar")), pattern, str(path))
        if path.exists():
            return [pattern]
        found = sorted(glob.glob(pattern))  # noqa: PTH207 (Path.glob takes no absolute patterns)
        return _some(found, pattern, str(path.parent))

    def _remote_matches(self, address: str) -> list[str]:
        if scheme_of(address) in ("http", "https"):
            if address.endswith("/") or "*" in address.partition("?")[0]:
                raise FewstepError(
                    f"'{shown(address)}' cannot be listed, since http has no folders; name the "
                    "files with braces instead, such as https://host/part-{000..127}.tar"
                )
            return [address]
        pattern = f"{address}*.tar" if address.endswith("/") else address
        if not glob.has_magic(pattern):
            return [pattern]
        found = self.remote.glob(pattern)
        if not found:
            fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
            folder = f"{fixed.rpartition('/')[0]}/"
            raise _nothing(pattern, folder, self.remote.listing(folder))
        return found

    # ------------------------------------------------------------------ files

    def local(self, address: str) -> Path:
        """A local file with the shard's contents: itself, or its copy, brought in if need be.

        Copies may be removed at any time to make room; to hold on to one use :meth:`descriptor`.

        Raises:
            FewstepError: if a remote shard cannot be brought in.
        """
        if self.is_local(address):
            return Path(plain(address))
        return self.cache.shard(address, self._name(address))

    def descriptor(self, address: str) -> int:
        """An open file descriptor of the shard, for reading; the caller closes it.

        It stays valid when the copy is removed to make room for others.

        Raises:
            FewstepError: if there is no such file, or it cannot be brought in.
        """
        for _ in range(self.patience.attempts):
            path = self.local(address)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                if self.is_local(address):
                    raise MissingError(f"The shard '{address}' does not exist. {REMEDY}") from error
        raise FewstepError(
            f"The copy of '{shown(address)}' is removed again and again before it can be opened: "
            "the cache is too small for so many processes; raise data.init_args.cache_gib."
        )

    def prefetch(self, addresses: Iterable[str]) -> None:
        """Begins to bring shards in, in the background, and returns at once.

        Shards that are here or on their way are left alone. Faults are not reported: whoever needs
        the shard will meet them again.
        """
        for address in addresses:
            if not self.is_local(address):
                prefetch(self.cache, address, self._name(address))

    def companion(self, address: str, suffix: str) -> Path | None:
        """The side-car of a shard (``x.tar`` and ``.index`` give ``x.tar.index``), if there is one.

        Copies of remote ones are kept for good. A server may well answer "forbidden" where it means
        "not there", as S3 does to those who may not list: that too counts as none.

        Raises:
            FewstepError: if a remote one cannot be brought in.
        """
        if self.is_local(address):
            path = Path(f"{plain(address)}{suffix}")
            return path if path.is_file() else None
        where, mark, query = address.partition("?")
        beside = f"{where}{suffix}{mark}{query}"
        try:
            return self.cache.companion(beside, self._name(beside))
        except (MissingError, DeniedError) as error:
            logger.debug("No side-car %s: %s", suffix, error)
            return None

    def own(self, address: str, suffix: str) -> Path:
        """Where to keep a file of ours about a shard if it cannot lie beside it.

        The same for all processes that share the cache; the folder need not exist yet.
        """
        return self.root / "own" / f"{self._name(address)}{suffix}"

    def _name(self, address: str) -> str:
        """A file name for an address: readable, and different for different addresses."""
        named = identity(address)
        if not self.is_local(address):
            named = f"{self.remote.endpoint(address)} {named}"
        digest = hashlib.sha256(named.encode()).hexdigest()[:32]
        base = address.partition("?")[0].rpartition("/")[2]
        return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-100:]}"


def _some(found: list[str], pattern: str, folder: str) -> list[str]:
    if not found:
        path = Path(folder)
        raise _nothing(pattern, folder, _names(path) if path.is_dir() else None)
    return found


def _nothing(pattern: str, folder: str, entries: list[str] | None) -> FewstepError:
    if entries is None:
        state = "does not exist"
    else:
        state = f"exists but holds none ({'; '.join(_few(entries)) or 'it is empty'})"
    return FewstepError(f"No shards match '{pattern}': the folder '{folder}' {state}. {REMEDY}")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _few(entries: list[str]) -> Iterator[str]:
    if entries:
        yield f"it holds {', '.join(entries[:NAMED])}"
    if len(entries) > NAMED:
        yield f"{len(entries):,} entries in all"
