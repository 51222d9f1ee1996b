"""What went wrong while reading from afar, and trying again where that may help."""

from __future__ import annotations

import http
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from datamodules.sources.addresses import shown
from fewstep.errors import FewstepError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

TRANSIENT_STATUS = {408, 412, 425, 429}  # 412: the file changed while it was read; begin anew
MISSING_STATUS = {404, 410}
DENIED_STATUS = {401, 403, 407}

# Known by name, because most of these packages are optional and need not be imported here.
DENIED_ERRORS = {
    "botocore.NoCredentialsError",
    "botocore.PartialCredentialsError",
    "google.DefaultCredentialsError",
}
LASTING_ERRORS = {
    "aiohttp.InvalidURL",
    "aiohttp.ClientConnectorCertificateError",
    "botocore.ParamValidationError",
    "botocore.ProfileNotFound",
}
TRANSIENT_ERRORS = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "asyncio.IncompleteReadError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "botocore.ResponseParserError",
    "google.TransportError",
    "http.HTTPException",
    "httpx.TransportError",
}


class MissingError(FewstepError):
    """There is no such file at the address."""


class DeniedError(FewstepError):
    """The server does not let us read the address."""


class TruncatedError(OSError):
    """Fewer bytes arrived than were announced."""


class Fault(Enum):
    """Kinds of faults, by what can be done about them."""

    MISSING = "missing"
    DENIED = "denied"
    TRANSIENT = "transient"
    LASTING = "lasting"


@dataclass
class Patience:
    """How long to keep trying.

    Attributes:
        attempts: tries in a row that may fail without a single new byte.
        base_delay: seconds before the second try; doubled for each one after it.
        max_delay: seconds between tries at the most.
        timeout: seconds without an answer or a byte after which a try has failed.
    """

    attempts: int = 6
    base_delay: float = 1.0
    max_delay: float = 60.0
    timeout: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures, with jitter so that workers spread."""
        # The system's generator: neither seeded by the user nor the same in all forked workers.
        jitter = random.SystemRandom().uniform(0.5, 1.5)
        return min(self.max_delay, self.base_delay * 2.0 ** (failures - 1)) * jitter


def fault_of(error: BaseException) -> Fault | None:
    """What kind of fault an exception is; None if it is none of reading from afar."""
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if names & LASTING_ERRORS:
        return Fault.LASTING
    if isinstance(error, PermissionError) or names & DENIED_ERRORS:
        return Fault.DENIED
    if isinstance(error, FileNotFoundError):
        return Fault.MISSING
    # Before the status: aiohttp calls a cut body a "400".
    if isinstance(error, TimeoutError | ConnectionError) or names & TRANSIENT_ERRORS:
        return Fault.TRANSIENT
    status = _status(error)
    if status is not None:
        return _fault_of_status(status)
    return Fault.TRANSIENT if isinstance(error, OSError) else None


def _fault_of_status(status: int) -> Fault:
    if status in TRANSIENT_STATUS or status >= 500:
        return Fault.TRANSIENT
    if status in MISSING_STATUS:
        return Fault.MISSING
    return Fault.DENIED if status in DENIED_STATUS else Fault.LASTING


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an exception of aiohttp, botocore, gcsfs or huggingface_hub."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            inner = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            inner = getattr(response, "status_code", None)
        for status in (inner, getattr(error, "status", None), getattr(error, "code", None)):
            if isinstance(status, int) and 400 <= status < 600:
                return status
        error = error.__cause__
    return None


def described(error: BaseException) -> str:
    """One line about an exception, free of signed addresses."""
    text = str(error).strip()
    status = _status(error)
    if status is not None and getattr(error, "status", None) == status:
        # aiohttp, whose text is mostly the address
        phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""
        return f"HTTP {status} {phrase}".strip()
    if not text and isinstance(error, TimeoutError):
        return "no answer in time"
    text = re.sub(r"(https?://\S*?)\?\S+", r"\1?...", text)
    return f"{type(error).__name__}: {text[:300]}"


def patiently(
    address: str,
    action: Callable[[], Result],
    patience: Patience,
    progress: Callable[[], int] = lambda: 0,
) -> Result:
    """Does ``action``, and again after transient faults.

    Args:
        address: named in messages.
        action: what to do; may raise anything.
        patience: how often and how long.
        progress: a number that grows as the work gets on; a try that got further than all before
            it begins the count of failures anew.

    Raises:
        MissingError: if the address does not exist.
        DeniedError: if it may not be read.
        FewstepError: for another lasting fault, or when patience is at an end.
    """
    failures, furthest = 0, progress()
    while True:
        try:
            return action()
        except FewstepError:
            raise
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            if fault is not Fault.TRANSIENT:
                raise _lasting(address, fault, error) from error
            if progress() > furthest:
                failures, furthest = 0, progress()
            failures += 1
            if failures >= patience.attempts:
                raise FewstepError(
                    f"Gave up on '{shown(address)}' after {failures} attempts in a row; the last "
                    f"one failed with {described(error)}. Check the server and the network, or "
                    "raise data.init_args.attempts."
                ) from error
            delay = patience.delay(failures)
            logger.warning(
                "Attempt %d of %d at '%s' failed (%s); next in %.1f s.",
                *(failures, patience.attempts, shown(address), described(error), delay),
            )
        time.sleep(delay)


def _lasting(address: str, fault: Fault, error: Exception) -> FewstepError:
    name, reason = shown(address), described(error)
    if fault is Fault.MISSING:
        return MissingError(
            f"'{name}' does not exist ({reason}). Check the address for typing mistakes; to read "
            "all shards of a remote folder, end its address with '/'."
        )
    if fault is Fault.DENIED:
        return DeniedError(
            f"'{name}' may not be read ({reason}). Check that your credentials are set and allow "
            "reading it; for public s3 or gs buckets set storage_options, such as "
            "{s3: {anon: true}} or {gs: {token: anon}}."
        )
    return FewstepError(
        f"Cannot read '{name}': {reason}. Check the address and its storage_options."
    )
