"""Requests to the Hub, with retries and with errors translated to ours.

Everything goes through huggingface_hub, which handles tokens, endpoint, proxies and offline mode.
It is only imported once the Hub is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from moescale.errors import DestinationError, MoescaleError, SourceError, TemporaryError
from moescale.version import __version__

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

ATTEMPTS = 5
LONGEST_WAIT = 300.0
"""Seconds; if the server asks for a longer wait, the run ends, and can be continued."""

_CONFLICT = "another conflicting operation is in progress"
"""The Hub's answer while it creates another repo of the user; the client would retry forever."""

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
RESUMES = "Run the same command again; it resumes."
UNREACHABLE = "Check the network, then run the same command again."

_STORAGE_ANSWER = re.compile(
    r"HTTP status \w+ error \((?P<status>\d+)[^)]*\)(?P<token>, domain: \S+/xet-write-token/)?"
)
_own_request: ContextVar[bool] = ContextVar("moescale_request", default=False)
_guarded: WeakSet[httpx2.Client] = WeakSet()
_T = TypeVar("_T")


class BusyError(TemporaryError):
    """The Hub cannot answer for now.

    Attributes:
        retry_after: the wait in seconds that it asks for, if any.
    """

    def __init__(self, message: str, *, hint: str = RESUMES, retry_after: float | None = None):
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


# The client ---------------------------------------------------------------------------------


@functools.cache
def hf_api() -> HfApi:
    """The client of huggingface_hub; its requests go through `session`."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    return HfApi(library_name="moescale", library_version=__version__)


def session() -> httpx2.Client:
    """The session of the client, or one that the user set, with time limits on all requests."""
    from huggingface_hub import get_session

    client = get_session()
    if client not in _guarded:
        _guard(client)
        _guarded.add(client)
    return client


def _guard(client: httpx2.Client) -> None:
    """Give the client time limits, and make our own requests fail at once with `BusyError`.

    Some calls of huggingface_hub have no time limit, and would stall forever. Others repeat a
    request themselves, which would multiply with our attempts; only the parts of an upload are
    left to them.
    """
    import httpx2

    send = client.send

    def guarded(request: httpx2.Request, **more: Any) -> httpx2.Response:
        _limit_time(request)
        if not _own_request.get():
            return send(request, **more)
        part = request.method == "PUT"
        try:
            response = send(request, **more)
        except httpx2.TransportError as error:
            if part:  # after a ConnectError the client would take another session
                raise httpx2.NetworkError(str(error), request=request) from error
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                raise BusyError(
                    f"cannot be reached: {_first_line(error)}", hint=UNREACHABLE
                ) from None
            raise BusyError(f"the connection broke: {_first_line(error)}") from None
        asked = _retry_after(response.headers)
        if response.status_code in TRANSIENT_STATUS and (not part or (asked or 0) > LONGEST_WAIT):
            response.close()
            raise BusyError(f"the Hub answered {response.status_code}", retry_after=asked)
        if response.status_code == 409 and not more.get("stream") and _CONFLICT in response.text:
            raise BusyError("another operation is in progress (409)", retry_after=asked)
        return response

    client.send = guarded  # type: ignore[method-assign]


def _limit_time(request: httpx2.Request) -> None:
    from huggingface_hub import constants

    limits = request.extensions.get("timeout") or {}
    longest = (3.0 if request.method == "GET" else 6.0) * constants.HF_HUB_DOWNLOAD_TIMEOUT
    request.extensions["timeout"] = {
        key: longest if limits.get(key) is None else limits[key]
        for key in ("connect", "read", "write", "pool")
    }


def headers() -> dict[str, str]:
    """The headers of a request to the Hub, with the user's token if there is one."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # see its __all__

    return build_hf_headers(library_name="moescale", library_version=__version__)


def has_token() -> bool:
    """Whether the user is logged in."""
    from huggingface_hub import get_token

    return get_token() is not None


@dataclass(frozen=True, slots=True)
class Access:
    """The access to the Hub that all machines of a run must have.

    Attributes:
        endpoint: the SHA-256 of the Hub's address, which may contain a password.
        logged_in: whether there is a token.
    """

    endpoint: str
    logged_in: bool

    @classmethod
    def here(cls) -> Access:
        """The access of this machine."""
        return cls(hashlib.sha256(hf_api().endpoint.encode()).hexdigest(), has_token())

    def check_here(self, what: str, permanent: type[MoescaleError]) -> None:
        """Compare it with the access of this machine.

        Raises:
            MoescaleError: an error of class `permanent`; the Hub differs, or there is no token.
        """
        here = Access.here()
        if here.endpoint != self.endpoint:
            raise permanent(f"{what}: HF_ENDPOINT names a different Hub here")
        if self.logged_in and not here.logged_in:
            raise permanent(
                f"{what}: not logged in to the Hub here",
                hint="Set HF_TOKEN in the worker's environment; moescale never sends a token.",
            )


# Errors -------------------------------------------------------------------------------------


@contextmanager
def translated_errors(what: str, permanent: type[MoescaleError] = SourceError) -> Iterator[None]:
    """Turn the client's exceptions into our errors.

    Args:
        what: the object of the request, for the message.
        permanent: the class of an error that a retry does not help.
    """
    token = _own_request.set(True)
    try:
        session()
        yield
    except Exception as error:
        translated = _translated(what, error, permanent)
        if translated is error:
            raise
        raise translated from None
    finally:
        _own_request.reset(token)


def _translated(what: str, error: Exception, permanent: type[MoescaleError]) -> Exception:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    match error:
        case BusyError():
            message = f"{what}: {error.message}"
            return BusyError(message, hint=error.hint or RESUMES, retry_after=error.retry_after)
        case MoescaleError():
            return error
        case OfflineModeIsEnabled() if permanent is DestinationError:
            return permanent(
                f"{what}: cannot be written to because HF_HUB_OFFLINE is set",
                hint="Unset HF_HUB_OFFLINE, or give a directory as DST.",
            )
        case OfflineModeIsEnabled():
            return permanent(
                f"{what}: is not in the Hub cache, and HF_HUB_OFFLINE is set",
                hint="Unset HF_HUB_OFFLINE, or download the model first.",
            )
        case HfHubHTTPError():
            request, status = error.response.request, error.response.status_code
            if page := gated_page(error.response):
                return permanent(
                    f"{what}: the repo is gated ({status})", hint=accept_terms_hint(page)
                )
            if request.method == "PUT" or request.url.path.endswith("/lfs/verify"):
                # the upload failed, for example because its address expired
                return BusyError(f"{what}: the Hub's storage answered {status}")
            return _http_error(what, status, _first_line(error), permanent)
        case httpx2.TransportError():
            return BusyError(f"{what}: the connection broke: {_first_line(error)}")
        case httpx2.HTTPError() | json.JSONDecodeError() | UnicodeDecodeError():
            return BusyError(f"{what}: the Hub's answer is not readable: {_first_line(error)}")
        case ValueError():  # the client refuses to send it
            return permanent(f"{what}: {_first_line(error)}")
        case RuntimeError(__cause__=Exception() as cause):
            return _translated(what, cause, permanent)
    return _storage_error(what, error, permanent)


def gated_page(response: Any) -> str | None:
    """The page on which to accept the terms of a gated repo; None if the repo is not gated."""
    if response.headers.get("X-Error-Code") != "GatedRepo":
        return None
    repo = re.match(r"(?:/api/models)?/([^/]+/[^/]+)", response.request.url.path)
    return f"{hf_api().endpoint}/{repo[1]}" if repo else None


def accept_terms_hint(page: str) -> str:
    """The hint for a gated repo."""
    login = "" if has_token() else ", log in with `hf auth login` or set HF_TOKEN"
    return f"Accept its terms at {page}{login}, then run the same command again."


def _http_error(what: str, status: int, line: str, permanent: type[MoescaleError]) -> MoescaleError:
    if status in TRANSIENT_STATUS:
        return BusyError(f"{what}: the Hub answered {status}")
    why, hint = _REFUSALS.get(status, (f"the Hub answered {status}: {line}", None))
    return permanent(f"{what}: {why}", hint=hint)


_REFUSALS = {
    401: (
        "not found, or the token is missing or expired (401)",
        "Check the name; log in with `hf auth login` or set HF_TOKEN. A rerun resumes.",
    ),
    403: (
        "the token does not allow it (403)",
        "Ask for access on the repo's page, or use a token with write access.",
    ),
    404: ("not found (404)", "Check the name and the revision."),
    412: (
        "someone else has changed the branch (412)",
        "Look at the branch; the same command resumes, --overwrite replaces the new content.",
    ),
}


def _storage_error(what: str, error: Exception, permanent: type[MoescaleError]) -> Exception:
    """An error of hf_xet, which raises the system's exceptions without error numbers."""
    if not isinstance(error, OSError | RuntimeError) or getattr(error, "errno", None) is not None:
        return error
    if isinstance(error, PermissionError):
        return _http_error(what, 401, "", permanent)
    if answer := _STORAGE_ANSWER.search(str(error)):
        if answer["token"]:
            return _http_error(what, int(answer["status"]), _first_line(error), permanent)
        return BusyError(f"{what}: the Hub's storage answered {answer['status']}")
    return BusyError(f"{what}: the connection to the Hub's storage broke: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The first line of an error's text, shortened and without the token."""
    from huggingface_hub import get_token

    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), type(error).__name__)
    token = get_token()
    return (first.replace(token, "[token]") if token else first)[:300]


# Attempts -----------------------------------------------------------------------------------


def retry(call: Callable[[], _T], what: str, permanent: type[MoescaleError] = SourceError) -> _T:
    """The result of `call`, tried again while the Hub cannot answer."""
    for attempt in range(ATTEMPTS):
        try:
            with translated_errors(what, permanent):
                return call()
        except TemporaryError as error:
            if attempt == ATTEMPTS - 1:
                raise
            wait_before_retry(attempt, error)
    raise AssertionError("unreachable")


def wait_before_retry(attempt: int, error: MoescaleError | None = None) -> None:
    """Wait before the next attempt, as long as the server asks for.

    Raises:
        TemporaryError: the server asks for more than `LONGEST_WAIT`.
    """
    asked = error.retry_after if isinstance(error, BusyError) else None
    if asked is not None and asked > LONGEST_WAIT:
        raise TemporaryError(
            f"{error}: the Hub asks to wait {asked:.0f} s".replace(f"\n{RESUMES}", ""),
            hint="Wait that long, then run the same command again; it resumes.",
        )
    sleep(min(8.0, 0.5 * 2.0**attempt) if asked is None else asked)


def sleep(seconds: float) -> None:
    """Wait; tests replace this function."""
    time.sleep(seconds)


def _retry_after(answer: Mapping[str, str]) -> float | None:
    """The wait in seconds that an answer asks for, in either of the Hub's two forms."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = answer.get("retry-after", "")
    if value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers(answer)
    return float(limit.reset_in_seconds) if limit is not None and not limit.remaining else None
