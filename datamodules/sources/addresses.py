"""Addresses of shards: which are allowed, what they name, and how messages show them."""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.errors import FewstepError

PROTOCOLS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
LOCAL_SCHEMES = ("", "file")


def scheme_of(address: str) -> str:
    """The scheme of an address, '' for a plain path.

    Raises:
        FewstepError: if it is not one of those we read.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address)
    scheme = found[1] if found else ""
    if scheme in LOCAL_SCHEMES or (scheme in PROTOCOLS and address.startswith(f"{scheme}://")):
        return scheme
    reason = f"'{scheme}:' is no kind of address that is read"
    if scheme == "pipe":
        reason = "it would run a shell command, which is never done"
    raise FewstepError(
        f"Cannot read '{shown(address)}': {reason}. Use a local path or an address that begins "
        f"with file:, {', '.join(f'{name}://' for name in PROTOCOLS)} (a local file whose name has "
        "a colon is written with ./ before it)."
    )


def plain(address: str) -> str:
    """The path behind a local address, ``~`` expanded."""
    if address.startswith("file:"):
        address = address.removeprefix("file:").removeprefix("//")
    return str(Path(address).expanduser())


def identity(address: str) -> str:
    """What two addresses of the same file have in common: the resolved path, if it is local."""
    return str(Path(plain(address)).resolve()) if scheme_of(address) in LOCAL_SCHEMES else address


def shown(address: str) -> str:
    """The address as messages and logs may show it: without passwords, keys and signatures."""
    if not address.startswith("http"):
        return address
    return re.sub(r"\?\S+", "?...", re.sub(r"//[^/@?]*@", "//", address))
