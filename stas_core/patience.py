"""Patience with object stores: what fails because a server or the network is away for a while is tried again.

One policy for reading and writing: waits that double from half a second to ten, for `STAS_STORAGE_PATIENCE_S` seconds
in all (an environment variable; 90 by default, 0: one attempt). What no wait mends (a wrong name, missing rights,
wrong credentials) fails at once.
"""

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stas_core.errors import ConfigError, StorageError

VARIABLE = "STAS_STORAGE_PATIENCE_S"
DEFAULT_S = 90.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
_BUSY = {408, 429}
"""Statuses below 500 by which a server asks for patience: a time-out, and too many requests."""
_CONNECTION_ERRORS = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError"}
"""Base classes of what botocore and aiohttp raise where a connection fails or breaks; neither need be installed."""
_LOG = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def patience_s() -> float:
    """Return for how many seconds a request is repeated.

    Raises:
        ConfigError: the environment variable is no such number.
    """
    value = os.environ.get(VARIABLE, str(DEFAULT_S))
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{VARIABLE} = {value!r}, expected seconds, such as 90; 0 for one attempt")
    return seconds


def patient(function: Callable[P, R]) -> Callable[P, R]:
    """Repeat a function as long as it raises a StorageError that may pass, within the patience."""

    @functools.wraps(function)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        began, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                return function(*args, **kwargs)
            except StorageError as error:
                left_s = patience_s() - (time.monotonic() - began)
                if left_s <= 0 or not may_pass(error):
                    raise
                _LOG.warning("%s; trying again for %.0f s", error, left_s)
                time.sleep(min(wait_s, left_s))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    return repeated


def may_pass(error: BaseException) -> bool:
    """Tell whether an error's cause is a server or a network that is away or busy, not what was asked of it."""
    cause: BaseException | None = error
    while cause is not None:
        status = _status_of(cause)
        if isinstance(cause, ConnectionError | TimeoutError) or status in _BUSY or status >= 500:
            return True
        if {base.__name__ for base in type(cause).__mro__} & _CONNECTION_ERRORS:
            return True
        cause = cause.__cause__
    return False


def _status_of(cause: BaseException) -> int:
    """Return the HTTP status of an answer, as clients of S3, Google Cloud and Azure have it; 0: there is none."""
    response = getattr(cause, "response", None)
    if isinstance(response, dict):  # botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    found = (str(getattr(cause, name, "")) for name in ("code", "status", "status_code"))  # gcsfs, aiohttp, azure
    return next((int(status) for status in found if status.isdigit()), 0)
