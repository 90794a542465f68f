"""What source and destination on the Hub have in common: requests, and errors in our words.

Everything goes through huggingface_hub, so tokens, endpoint, proxies and offline mode are its
business. Nothing of it is imported before the Hub is used.
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
"""Seconds; a server that asks for a longer wait ends the run, which can be continued."""

_CONFLICT = "another conflicting operation is in progress"
"""What the Hub says when it makes another repo of the user; the client would ask without end."""

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
RESUMES = "Run the same command again; it resumes."
UNREACHABLE = "Check the network, then run the same command again."

_STORAGE_ANSWER = re.compile(
    r"HTTP status \w+ error \((?P<status>\d+)[^)]*\)(?P<token>, domain: \S+/xet-write-token/)?"
)
_ours: ContextVar[bool] = ContextVar("moescale_request", default=False)
_guarded: WeakSet[httpx2.Client] = WeakSet()
_T = TypeVar("_T")


class BusyError(TemporaryError):
    """The Hub is out of order for now; `retry_after` is the wait in seconds that it asks for."""

    def __init__(self, message: str, *, hint: str = RESUMES, retry_after: float | None = None):
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


# The client ---------------------------------------------------------------------------------


@functools.cache
def api() -> HfApi:
    """The client; `session` is what its requests go through."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    return HfApi(library_name="moescale", library_version=__version__)


def session() -> httpx2.Client:
    """The client's own session, which a user may have made, with time limits on all requests."""
    from huggingface_hub import get_session

    client = get_session()
    if client not in _guarded:
        _guard(client)
        _guarded.add(client)
    return client


def _guard(client: httpx2.Client) -> None:
    """Give the client time limits, and let our own requests fail at once with `BusyError`.

    Some calls of huggingface_hub ask for no time limit at all; a stall would be for ever. Others
    repeat a request by themselves, which would multiply with our attempts; it is only left to
    them where they repeat a part of an upload.
    """
    import httpx2

    send = client.send

    def guarded(request: httpx2.Request, **more: Any) -> httpx2.Response:
        _limit_time(request)
        if not _ours.get():
            return send(request, **more)
        part = request.method == "PUT"
        try:
            response = send(request, **more)
        except httpx2.TransportError as error:
            if part:  # not as ConnectError, after which the client would take another session
                raise httpx2.NetworkError(str(error), request=request) from error
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                raise BusyError(f"cannot be reached: {_line(error)}", hint=UNREACHABLE) from None
            raise BusyError(f"the connection broke: {_line(error)}") from None
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
    """What the machines of a run must have in common, without saying it: the Hub, and a login."""

    endpoint: str  # its digest, since an address may hold a password
    logged_in: bool

    @classmethod
    def here(cls) -> Access:
        """That of this machine."""
        return cls(hashlib.sha256(api().endpoint.encode()).hexdigest(), has_token())

    def check(self, what: str, refused: type[MoescaleError]) -> None:
        """Compare it with that of this machine.

        Raises:
            MoescaleError: as `refused`; it is another Hub, or nobody is logged in.
        """
        here = Access.here()
        if here.endpoint != self.endpoint:
            raise refused(f"{what}: HF_ENDPOINT names another Hub here")
        if self.logged_in and not here.logged_in:
            raise refused(
                f"{what}: nobody is logged in to the Hub here",
                hint="Set HF_TOKEN in the worker's environment; a token is never sent to it.",
            )


# Errors -------------------------------------------------------------------------------------


@contextmanager
def in_our_words(what: str, refused: type[MoescaleError] = SourceError) -> Iterator[None]:
    """Turn what the client raises into our errors.

    Args:
        what: the object of the request, for the message.
        refused: the error for what will not go better the next time.
    """
    token = _ours.set(True)
    try:
        session()
        yield
    except Exception as error:
        translated = _translated(what, error, refused)
        if translated is error:
            raise
        raise translated from None
    finally:
        _ours.reset(token)


def _translated(what: str, error: Exception, refused: type[MoescaleError]) -> Exception:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    match error:
        case BusyError():
            message = f"{what}: {error.message}"
            return BusyError(message, hint=error.hint or RESUMES, retry_after=error.retry_after)
        case MoescaleError():
            return error
        case OfflineModeIsEnabled() if refused is DestinationError:
            return refused(
                f"{what}: cannot be written to, since HF_HUB_OFFLINE is set",
                hint="Unset HF_HUB_OFFLINE, or give a directory as DST.",
            )
        case OfflineModeIsEnabled():
            return refused(
                f"{what}: is not in the Hub cache, and HF_HUB_OFFLINE is set",
                hint="Unset HF_HUB_OFFLINE, or download the model first.",
            )
        case HfHubHTTPError():
            request, status = error.response.request, error.response.status_code
            if page := gate(error.response):
                return refused(f"{what}: the repo is gated ({status})", hint=accept(page))
            if request.method == "PUT" or request.url.path.endswith("/lfs/verify"):
                # an upload did not arrive, because its address expired, say
                return BusyError(f"{what}: the Hub's storage answered {status}")
            return _http_error(what, status, _line(error), refused)
        case httpx2.TransportError():
            return BusyError(f"{what}: the connection broke: {_line(error)}")
        case httpx2.HTTPError() | json.JSONDecodeError() | UnicodeDecodeError():
            return BusyError(f"{what}: the Hub answered with something else: {_line(error)}")
        case ValueError():  # what the client refuses to send
            return refused(f"{what}: {_line(error)}")
        case RuntimeError(__cause__=Exception() as cause):
            return _translated(what, cause, refused)
    return _storage_error(what, error, refused)


def gate(response: Any) -> str | None:
    """The page of a gated repo, where its terms are accepted; None if that is not the reason."""
    if response.headers.get("X-Error-Code") != "GatedRepo":
        return None
    repo = re.match(r"(?:/api/models)?/([^/]+/[^/]+)", response.request.url.path)
    return f"{api().endpoint}/{repo[1]}" if repo else None


def accept(page: str) -> str:
    """What to do about a gated repo."""
    login = "" if has_token() else ", log in with `hf auth login` or set HF_TOKEN"
    return f"Accept its terms at {page}{login}, then run the same command again."


def _http_error(what: str, status: int, line: str, refused: type[MoescaleError]) -> MoescaleError:
    if status in TRANSIENT_STATUS:
        return BusyError(f"{what}: the Hub answered {status}")
    why, hint = _REFUSALS.get(status, (f"the Hub answered {status}: {line}", None))
    return refused(f"{what}: {why}", hint=hint)


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
        "somebody else has changed the branch meanwhile (412)",
        "See what is there; the same command resumes, --overwrite replaces the new content.",
    ),
}


def _storage_error(what: str, error: Exception, refused: type[MoescaleError]) -> Exception:
    """What hf_xet raises: the system's error classes without the system's numbers."""
    if not isinstance(error, OSError | RuntimeError) or getattr(error, "errno", None) is not None:
        return error
    if isinstance(error, PermissionError):
        return _http_error(what, 401, "", refused)
    if answer := _STORAGE_ANSWER.search(str(error)):
        if answer["token"]:
            return _http_error(what, int(answer["status"]), _line(error), refused)
        return BusyError(f"{what}: the Hub's storage answered {answer['status']}")
    return BusyError(f"{what}: the connection to the Hub's storage broke: {_line(error)}")


def _line(error: Exception) -> str:
    """What an error says, in one line of moderate length and without the token."""
    from huggingface_hub import get_token

    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), type(error).__name__)
    token = get_token()
    return (first.replace(token, "[token]") if token else first)[:300]


# Attempts -----------------------------------------------------------------------------------


def retried(call: Callable[[], _T], what: str, refused: type[MoescaleError] = SourceError) -> _T:
    """The result of `call`, which is tried again while the Hub is out of order."""
    for attempt in range(ATTEMPTS):
        try:
            with in_our_words(what, refused):
                return call()
        except TemporaryError as error:
            if attempt == ATTEMPTS - 1:
                raise
            pause(attempt, error)
    raise AssertionError("unreachable")


def pause(attempt: int, error: MoescaleError | None = None) -> None:
    """Wait before the next attempt: as long as the server asks for, if it does.

    Raises:
        TemporaryError: the server asks for longer than anybody would wait.
    """
    asked = error.retry_after if isinstance(error, BusyError) else None
    if asked is not None and asked > LONGEST_WAIT:
        raise TemporaryError(
            f"{error}: the Hub asks to wait {asked:.0f} s".replace(f"\n{RESUMES}", ""),
            hint="Run the same command again then; it resumes.",
        )
    sleep(min(8.0, 0.5 * 2.0**attempt) if asked is None else asked)


def sleep(seconds: float) -> None:
    """Wait; one place, so that tests need not."""
    time.sleep(seconds)


def _retry_after(answer: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait, in either of the Hub's two ways."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = answer.get("retry-after", "")
    if value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers(answer)
    return float(limit.reset_in_seconds) if limit is not None and not limit.remaining else None
