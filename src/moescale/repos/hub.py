"""What source and sink on the Hub have in common: places, requests, and errors in our words.

Everything goes through huggingface_hub, so tokens, endpoint, proxies and offline mode are its
business. Nothing of it is imported before the Hub is used.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moescale.errors import MoescaleError, SourceError, TemporaryError, UsageError
from moescale.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf://"
ATTEMPTS = 5
LONGEST_WAIT = 300.0
"""Seconds; a server that asks for a longer wait ends the run, which can be continued."""

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A repo on the Hub and a revision of it, None for the default."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_place(text: str) -> HubPlace:
    """``hf://org/name[@revision]``, or ``org/name``.

    Raises:
        UsageError: it is neither.
    """
    repo, at, revision = text.removeprefix(PREFIX).partition("@")
    if not is_repo_id(repo) or (at and not revision):
        raise UsageError(f"{text!r} is not a Hub repo: hf://org/name or hf://org/name@revision")
    return HubPlace(repo, revision or None)


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form ``org/name``."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


@functools.cache
def api() -> HfApi:
    """The client, with time limits on all of its requests."""
    import httpx2
    from huggingface_hub import HfApi, constants, set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook
    from huggingface_hub.utils.tqdm import disable_progress_bars

    seconds = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)

    class Client(httpx2.Client):
        """Some calls of huggingface_hub ask for no time limit at all; a stall would be for ever."""

        def send(self, request: httpx2.Request, **more: Any) -> httpx2.Response:
            limits = request.extensions.get("timeout") or {}
            known = {key: limits.get(key) for key in ("connect", "read", "write", "pool")}
            request.extensions["timeout"] = {
                key: 6 * seconds if value is None else value for key, value in known.items()
            }
            return super().send(request, **more)

    set_client_factory(
        lambda: Client(
            event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=None
        )
    )
    disable_progress_bars()
    return HfApi(library_name="moescale", library_version=__version__)


def headers() -> dict[str, str]:
    """The headers of a request to the Hub, with the user's token if there is one."""
    from huggingface_hub.utils._headers import build_hf_headers

    return build_hf_headers(library_name="moescale", library_version=__version__)


@contextmanager
def in_our_words(what: str, refused: type[MoescaleError] = SourceError) -> Iterator[None]:
    """Turn what the client raises into our errors.

    Args:
        what: the object of the request, for the message.
        refused: the error for what will not go better the next time.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise refused(f"{what}: cannot be reached, HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as error:
        raise _http_error(what, error.response.status_code, str(error), refused) from None
    except (httpx2.TransportError, ConnectionError) as error:
        raise _broken(what, error) from None
    except (httpx2.HTTPError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise TemporaryError(f"{what}: the Hub answered with something else: {first}") from None


def _http_error(
    what: str, status: int, message: str, refused: type[MoescaleError]
) -> MoescaleError:
    if status in TRANSIENT_STATUS:
        return TemporaryError(
            f"{what}: the Hub answered {status}", hint="Run the same command again; it resumes."
        )
    if status == 401:
        return refused(
            f"{what}: not found, or the token is missing or expired (401)",
            hint="Check the name; log in with `hf auth login` or set HF_TOKEN. A rerun resumes.",
        )
    if status == 403:
        return refused(
            f"{what}: the token does not allow it (403)",
            hint="Ask for access on the repo's page, or use a token with write access.",
        )
    if status == 404:
        return refused(f"{what}: not found (404)", hint="Check the name and the revision.")
    first = next((line for line in message.splitlines() if line.strip()), "")
    return refused(f"{what}: the Hub answered {status}: {first}")


def _broken(what: str, error: Exception) -> TemporaryError:
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return TemporaryError(
        f"{what}: the connection broke: {first}", hint="Run the same command again; it resumes."
    )


def retried(call: Callable[[], _T], what: str, refused: type[MoescaleError] = SourceError) -> _T:
    """The result of `call`, which is tried again while the Hub is out of order."""
    for attempt in range(ATTEMPTS):
        try:
            with in_our_words(what, refused):
                return call()
        except TemporaryError:
            if attempt == ATTEMPTS - 1:
                raise
            sleep(wait_seconds(attempt))
    raise AssertionError("unreachable")


def sleep(seconds: float) -> None:
    """Wait; one place, so that tests need not."""
    time.sleep(seconds)


def wait_seconds(attempt: int, retry_after: str | None = None) -> float:
    """How long to wait before the next attempt; what the server asks for, if it does.

    Raises:
        TemporaryError: the server asks for longer than anybody would wait.
    """
    if retry_after is not None and retry_after.isdigit():
        seconds = float(retry_after)
        if seconds > LONGEST_WAIT:
            raise TemporaryError(
                f"the Hub asks to wait {seconds:.0f} s",
                hint="Run the same command again then; it resumes.",
            )
        return seconds
    return min(8.0, 0.5 * 2.0**attempt)
