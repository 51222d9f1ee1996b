"""Reading files at http(s), s3, gs and hf addresses, through fsspec and never through a shell."""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from datamodules.sources.addresses import PROTOCOLS, shown
from datamodules.sources.faults import Patience, patiently
from fewstep.errors import FewstepError, nearest

NEEDED = {  # the package behind each protocol, and what to install for it
    "http": ("aiohttp", "aiohttp"),
    "s3": ("s3fs", "fewstep[s3]"),
    "gs": ("gcsfs", "fewstep[gcs]"),
    "hf": ("huggingface_hub", "huggingface_hub"),
}
CHUNK = 32 * 2**20  # bytes a request: enough to hide its latency, little enough to hold in memory

Options = Mapping[str, Mapping[str, Any]]
Value = TypeVar("Value")


class PerProcess(Generic[Value]):
    """A value that each process makes for itself.

    What a parent made (threads, event loops, connections) is useless in a forked child, and
    closing it there would disturb the parent, who shares its sockets. So the child keeps it
    untouched for ever and makes its own. For module-level values only.
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._inherited: list[Value] = []
        self.value = make()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._inherited.append(self.value)
        self.value = self._make()


class _Filesystems:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: dict[str, Any] = {}


_filesystems = PerProcess(_Filesystems)


@dataclass(frozen=True)
class Body:
    """A file's contents as they arrive.

    Attributes:
        size: bytes of the whole file, as announced.
        start: offset of the first byte that ``chunks`` yield.
        version: tells whether two bodies are of the same file, or None if nothing does.
        chunks: the bytes from ``start`` on.
    """

    size: int
    start: int
    version: str | None
    chunks: Iterator[bytes]


class Remote:
    """Opens and lists remote files. Holds plain data only, so that it travels to workers.

    Args:
        storage_options: for fsspec's file systems, by protocol.
        patience: how long to wait and how often to try.

    Raises:
        FewstepError: if ``storage_options`` name an unknown protocol.
    """

    def __init__(self, storage_options: Options | None, patience: Patience) -> None:
        self.patience = patience
        self.options: dict[str, dict[str, Any]] = {}
        for name, options in (storage_options or {}).items():
            if name not in PROTOCOLS:
                raise FewstepError(
                    f"storage_options has '{name}', which is no protocol; use "
                    f"{', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}"
                )
            self.options.setdefault(PROTOCOLS[name], {}).update(options)

    def filesystem(self, address: str) -> Any:
        """This process's file system for an address.

        Raises:
            FewstepError: if the package it needs is missing, or its options are wrong.
        """
        protocol = PROTOCOLS[address.partition(":")[0]]
        options = _merged(_defaults(protocol, self.patience), self.options.get(protocol, {}))
        key = f"{protocol} {options!r}"
        state = _filesystems.value
        with state.lock:
            if key not in state.made:
                state.made[key] = _make(protocol, options)
            return state.made[key]

    def endpoint(self, address: str) -> str:
        """The server that an s3 address is looked up on where it is not the usual one, or ''."""
        options = self.options.get(PROTOCOLS[address.partition(":")[0]], {})
        named = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
        if not named and address.startswith("s3:"):
            named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return str(named or "")

    @contextmanager
    def open(self, address: str, start: int = 0, version: str | None = None) -> Iterator[Body]:
        """Opens a file, once; faults are raised as they come.

        Args:
            address: of the file.
            start: where to begin if the file is still of this ``version``; else it begins at 0.
            version: of the file that the first ``start`` bytes are from.
        """
        files = self.filesystem(address)
        if PROTOCOLS[address.partition(":")[0]] == "http":
            file = _open_http(files, address, start, version)
            read = _http_body
        else:
            # Without read-ahead, each read is one request for just these bytes.
            file = files.open(address, "rb", cache_type="none")
            read = _object_body
        try:
            yield read(file, start, version)
        finally:
            file.close()

    def glob(self, pattern: str) -> list[str]:
        """The files that match, as addresses, in order; empty if there are none."""
        files = self.filesystem(pattern)
        scheme = pattern.partition("://")[0]

        def names() -> list[str]:
            try:
                found = files.glob(pattern, detail=True)
            except FileNotFoundError:
                return []
            return sorted(name for name, entry in found.items() if entry["type"] == "file")

        return [f"{scheme}://{name}" for name in patiently(pattern, names, self.patience)]

    def listing(self, folder: str) -> list[str] | None:
        """Names of what lies in a remote folder, or None if there is no such folder."""
        files = self.filesystem(folder)

        def names() -> list[str] | None:
            try:
                found = files.ls(folder, detail=False)
            except FileNotFoundError:
                return None
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

        return patiently(folder, names, self.patience)


def _make(protocol: str, options: dict[str, Any]) -> Any:
    package, install = NEEDED[protocol]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise FewstepError(
            f"Reading {protocol} addresses needs the package {package}: pip install '{install}'"
        ) from error
    try:
        made = _class(protocol)(skip_instance_cache=True, **options)
    except (TypeError, ValueError) as error:
        raise FewstepError(
            f"Cannot reach {protocol} addresses with these storage_options "
            f"({', '.join(options)}): {error}"
        ) from error
    if protocol == "s3":
        made.retries = 1  # we try again ourselves, and say so
    return made


def _class(protocol: str) -> Any:
    if protocol == "gs":
        # The one registered by default asks about each bucket over gRPC, which dies in a fork.
        return importlib.import_module("gcsfs.core").GCSFileSystem
    return importlib.import_module("fsspec").get_filesystem_class(protocol)


def _defaults(protocol: str, patience: Patience) -> dict[str, Any]:
    if protocol == "http":
        aiohttp = importlib.import_module("aiohttp")
        # Never a limit on the whole: large shards take as long as they take.
        limit = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.timeout, sock_read=patience.timeout
        )
        return {"client_kwargs": {"timeout": limit, "trust_env": True}}  # for clusters' proxies
    if protocol == "s3":
        config = {
            "connect_timeout": patience.timeout,
            "read_timeout": patience.timeout,
            "retries": {"total_max_attempts": 1},
        }
        return {"config_kwargs": config, "use_listings_cache": False}
    return {"use_listings_cache": False}


def _merged(defaults: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options over the defaults, one level deep."""
    merged = {**defaults, **options}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(options.get(name), Mapping):
            merged[name] = {**value, **options[name]}
    return merged


def _open_http(files: Any, address: str, start: int, version: str | None) -> Any:
    headers = {**files.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    # A block size of 0 streams one request; a size, whatever it is, saves another one before it.
    return files.open(address, "rb", block_size=0, size=1, headers=headers)


def _http_body(file: Any, start: int, version: str | None) -> Body:
    response = file.r
    if response.content_type == "text/html":
        raise FewstepError(
            f"'{shown(file.url)}' is a web page, no file; the server may want you to log in."
        )
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206 and found:
        begins, size = int(found[1]), int(found[2])
    elif response.content_length is not None:
        begins, size = 0, int(response.content_length)
    else:
        raise FewstepError(
            f"The server of '{shown(file.url)}' does not announce the file's size, so a cut "
            "connection could not be noticed; serve it as a plain file."
        )
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return Body(size, begins, tag, _chunks(file))


def _object_body(file: Any, start: int, version: str | None) -> Body:
    names = ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified")
    found = next((file.details[name] for name in names if file.details.get(name)), None)
    tag = None if found is None else str(found)
    begins = start if tag is not None and tag == version else 0
    file.seek(begins)
    return Body(int(file.size), begins, tag, _chunks(file))


def _chunks(file: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = file.read(CHUNK)
        except IndexError as error:
            # s3fs stumbles over the time-out it is about to report.
            if isinstance(error.__context__, TimeoutError):
                raise TimeoutError("no answer in time") from error
            raise
        if not chunk:
            return
        yield chunk
