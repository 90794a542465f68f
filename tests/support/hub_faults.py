"""Requests as the loopback Hub logs them, and the faults that it injects at chosen ones."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Json = dict[str, Any]


@dataclass
class Request:
    """One request, and the number of body bytes in each direction."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    received: int = 0
    sent: int = 0
    status: int = 0
    fault: Fault | None = None

    def __str__(self) -> str:
        return f"{self.host} {self.method} {self.path} -> {self.status}"


@dataclass(frozen=True)
class FileSlice:
    """A part of a file as the body of a response."""

    path: Path
    offset: int
    length: int


@dataclass
class Response:
    """An answer before it is sent."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | FileSlice = b""

    @property
    def length(self) -> int:
        """The number of bytes of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.length


def json_response(data: object, status: int = 200, **headers: object) -> Response:
    """Make a JSON answer."""
    kept = {"Content-Type": "application/json; charset=utf-8"} | named(headers)
    return Response(status, kept, json.dumps(data).encode())


def named(headers: Mapping[str, object]) -> dict[str, str]:
    """Turn keyword names into header names: `Retry_After` is `Retry-After`."""
    return {name.replace("_", "-"): str(value) for name, value in headers.items()}


@dataclass(frozen=True)
class Action:
    """The effect of a fault, as steps around the normal answer.

    `before` runs first; if it returns an answer, that one is sent instead of the normal answer.
    `after` changes the normal answer, after its effects have happened.
    `cut` is the number of body bytes sent before `ending` (-1: not even the head).
    `upload_cut` is the number of request body bytes read before the connection is reset.
    """

    before: Callable[[Request], Response | None] | None = None
    after: Callable[[Response], Response] | None = None
    cut: int | None = None
    ending: str = "close"
    upload_cut: int | None = None
    ignore_range: bool = False
    corrupt: int | None = None
    rate: int | None = None


def status(code: int, body: object = None, **headers: object) -> Action:
    """Answer this status; nothing is applied. `Retry_After=1` becomes a header."""
    message = {"error": f"injected {code}"} if body is None else body
    text = message if isinstance(message, str) else json.dumps(message)
    kept = {"Content-Type": "application/json"} | named(headers)
    return Action(before=lambda _: Response(code, kept, text.encode()))


def html(code: int = 200) -> Action:
    """Answer an HTML page, as a captive portal or a maintenance page does."""
    page = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"
    return Action(before=lambda _: Response(code, {"Content-Type": "text/html"}, page))


def reset(after: int = -1) -> Action:
    """Reset the connection before the head (nothing is done), or after this many body bytes."""
    before = (lambda _: Response()) if after < 0 else None
    return Action(before=before, cut=after, ending="reset")


def reset_upload(after: int = 0) -> Action:
    """Reset the connection after reading this many bytes of the request's body."""
    return Action(upload_cut=after)


def truncate(after: int) -> Action:
    """Announce the whole length, send this many bytes and close the connection properly."""
    return Action(cut=after, ending="close")


def stall(after: int = -1) -> Action:
    """Stop before the head, or after this many body bytes, until released or the Hub closes.

    The request has been carried out by then; after a release the rest of the answer follows.
    """
    return Action(cut=after, ending="stall")


def ignore_range() -> Action:
    """Answer 200 with the whole file to a request for a range."""
    return Action(ignore_range=True)


def corrupt(at: int = 0) -> Action:
    """Flip the bits of one byte of the body."""
    return Action(corrupt=at)


def throttle(bytes_per_second: int) -> Action:
    """Send the body at this rate."""
    return Action(rate=bytes_per_second)


def applied(code: int = 500) -> Action:
    """Carry out the request, then answer this status as if it had failed."""
    answer = json_response({"error": f"injected {code} after the fact"}, code)
    return Action(after=lambda _: answer)


def lost() -> Action:
    """Carry out the request, then reset the connection before the response head."""
    return Action(cut=-1, ending="reset")


def run(function: Callable[[], object]) -> Action:
    """Run something on the server first (an expiry, another user's commit), then answer."""

    def before(_: Request) -> None:
        function()

    return Action(before=before)


Match = str | tuple[str, str] | Callable[[Request], bool]


def matcher(match: Match) -> Callable[[Request], bool]:
    """Turn a regex on `host path?query`, or a method and a regex, into a test of requests."""
    if callable(match):
        return match
    method, pattern = ("", match) if isinstance(match, str) else match
    regex = re.compile(pattern)

    def test(request: Request) -> bool:
        return method in ("", request.method) and bool(
            regex.search(f"{request.host} {request.path}")
        )

    return test


@dataclass
class Fault:
    """A rule: from the `nth` matching request on, the action applies to `times` requests."""

    match: Callable[[Request], bool]
    action: Action
    nth: int = 1
    times: int | None = 1
    seen: int = 0
    fired: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def takes(self, request: Request) -> bool:
        """Count a request, and say whether the fault applies to it."""
        if not self.match(request):
            return False
        self.seen += 1
        late = self.times is not None and self.seen >= self.nth + self.times
        return self.seen >= self.nth and not late

    def wait(self, timeout: float = 120) -> None:
        """Wait until the fault has happened, for instance until a stall has begun."""
        if not self.reached.wait(timeout):
            raise TimeoutError(f"fault not reached: {self}")

    def release(self) -> None:
        """Let stalled requests continue, now and later."""
        self.released.set()


class Log:
    """The requests so far, and the pending faults."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []

    def add(self, request: Request) -> Fault | None:
        """Log a request, and pick the fault that applies to it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if not fault.takes(request):
                    continue
                if request.fault is None:
                    request.fault = fault
                    fault.fired += 1
                else:  # an earlier rule took this request, so this one waits for the next
                    fault.nth += 1
            return request.fault

    def fault(self, match: Match, action: Action, nth: int, times: int | None) -> Fault:
        """Add a fault."""
        rule = Fault(matcher(match), replace(action), nth, times)
        with self._lock:
            self.faults.append(rule)
        return rule

    def find(self, match: Match) -> list[Request]:
        """List the logged requests that match."""
        test = matcher(match)
        with self._lock:
            return [request for request in self.requests if test(request)]

    def clear(self) -> None:
        """Forget requests and faults."""
        with self._lock:
            self.requests.clear()
            self.faults.clear()
