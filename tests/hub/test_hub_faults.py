"""A Hub that is busy, broken, slow or unreachable, at every request of a run."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from huggingface_hub import constants, get_session, set_client_factory
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, Lab, rescaled
from support.hub_faults import (
    Action,
    Match,
    applied,
    html,
    ignore_range,
    lost,
    reset,
    reset_upload,
    run,
    stall,
    status,
    truncate,
)

from moescale.errors import TemporaryError
from moescale.storage.hub import client as hub_module

WORK = ("POST", "/commit/moescale-unfinished-main")
LAST = ("POST", "/commit/main")
CREATE = ("POST", "repos/create")
DATA = r"^cdn /\w{64}"


def complete(lab: Lab) -> None:
    """Run the command without faults, and check the destination."""
    lab.hub.log.clear()
    lab.done(SRC, PLACE, "-k", "3", "-q")
    check(lab)


def check(lab: Lab) -> None:
    """Check the destination after a successful run."""
    hub = lab.hub
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)
    assert hub.branches(DST).keys() == {"main"}
    assert len(hub.repo(DST).history("main")) == 2
    titles = [c.title for c in hub.repo(DST).commits.values() if c.title in (*SHARDS, "Start")]
    assert len(titles) == len(set(titles))


Point = tuple[Match, bool | str]
POINTS: dict[str, Point] = {
    "the source's commit": (("GET", r"^api /api/models/lab/mix/?(revision|$)"), True),
    "the source's files": (("GET", "/api/models/lab/mix/tree/"), True),
    "a small file": (("GET", r"lab/mix/resolve/.*(config|tokenizer).json$"), True),
    "the address of a shard": (("GET", r"lab/mix/resolve/.*00002-of"), True),
    "the bytes of a shard": (DATA, True),
    "the destination": (("GET", r"^api /api/models/me/out(/tree|/revision|$)"), True),
    "creating the repo": (CREATE, True),
    "creating the branch": (("POST", "/branch/"), True),
    "the card": (("POST", "validate-yaml"), True),
    "the token for the storage": (("GET", "xet-write-token/main"), True),
    "the token for a shard": (("GET", "xet-write-token/moescale"), "http"),
    "before a commit": (("POST", "/preupload/"), True),
    "a commit with a shard": (WORK, True),
    "the last commit": (LAST, True),
    "deleting the branch": (("DELETE", "/branch/moescale-unfinished"), True),
    "a block of an upload": (("POST", "^cas /v1/xorbs"), "http"),
    "the end of an upload": (("POST", "^cas /v1/shards"), "http"),
    "asking what is there": (("GET", "^cas /v1/chunks"), "http"),
    "where to upload": (("POST", "objects/batch"), False),
    "an upload to the CDN": (("PUT", "^cdn"), False),
}
NO_BODY_IS_READ = {
    "creating the branch",
    "deleting the branch",
    "an upload to the CDN",
    "the token for the storage",
}
"""Requests where a page with status 200 passes as an answer, since the body is not read."""


@pytest.mark.parametrize("point", POINTS)
def test_what_passes_is_waited_for(lab: Lab, point: str) -> None:
    """The run repeats requests after 429, 503, a reset or an HTML page, and ends with 0."""
    match, xet = POINTS[point]
    hub = lab.start(xet=xet)
    actions = [status(429, Retry_After=7), status(503), reset()]
    if point not in NO_BODY_IS_READ and point != "asking what is there":
        actions.append(html())
    faults = [hub.fault(match, action) for action in actions]
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert all(fault.fired for fault in faults) or not faults[0].fired
    assert faults[0].fired or point == "asking what is there"
    if xet is True:
        assert 7 in lab.waits
    check(lab)


REFUSED = {
    "the bytes of a shard": 5,
    "a block of an upload": 5,
    "the end of an upload": 5,
    "an upload to the CDN": 5,
}


@pytest.mark.parametrize("point", POINTS)
def test_what_does_not_pass_ends_in_two_lines_and_a_rerun_completes(lab: Lab, point: str) -> None:
    """A lasting outage ends with 5, a refusal with 3, each after few requests; a rerun completes.

    If the storage refuses, an address may have expired, which is 5 too.
    """
    match, xet = POINTS[point]
    hub = lab.start(xet=xet)
    outages: list[Action] = [status(500), reset()]
    if point not in NO_BODY_IS_READ:
        outages.append(html())
    for action in outages:
        fault = hub.fault(match, action, times=None)
        # one shard at a time: a second one would ask until it hears that the run has ended
        outcome = lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1")
        if point == "asking what is there":
            assert outcome.code in (0, 5)
            break
        assert outcome.code == 5, outcome
        assert "the same command again; it resumes" in outcome.failure
        assert 1 <= fault.fired <= 36
        hub.log.clear()
    fault = hub.fault(match, status(403), times=None)
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1")
    if point != "asking what is there":
        assert outcome.code == REFUSED.get(point, 3), outcome
        assert "403" in outcome.failure
        assert 1 <= fault.fired <= 15
    complete(lab)


@pytest.mark.parametrize("point", POINTS)
def test_a_stall_does_not_hold_a_run_up_for_ever(lab: Lab, point: str) -> None:
    """A request without an answer ends at its time limit, and is repeated.

    A busy machine may miss a short limit at any request; then the run has a longer one.
    """
    match, xet = POINTS[point]
    hub = lab.start(xet=xet)
    endless = point == "the end of an upload"  # hf_xet itself waits without a limit
    for seconds in (10.0,) if endless else (0.2, 4.0, 60.0):
        with lab.monkeypatch.context() as limits:
            limits.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
            limits.setenv("HF_XET_CLIENT_READ_TIMEOUT", f"{5 * seconds:.0f}s")
            limits.setattr("moescale.storage.hub.upload.STALL_SECONDS", 2.0 if endless else 60.0)
            fault = hub.fault(match, stall())
            outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
        fault.release()
        assert outcome.code in (0, 5), outcome.err
        if outcome.code == 0:
            break
        hub.log.clear()
    if endless:
        assert "nothing arrived for 2 s" in outcome.failure
        complete(lab)
    assert endless or outcome.code == 0
    check(lab)


PULL = ("--create-pr", "--overwrite")
RARE: dict[str, tuple[Match, tuple[str, ...], int]] = {
    "the branches": (("GET", r"/refs(\?|$)"), (), 5),
    "the digests of a copy": (("POST", "paths-info"), ("--rule", "none"), 0),
    "a copy": (("POST", "lfs-files/duplicate"), ("--rule", "none"), 0),
    "the pull requests": (("GET", "/discussions"), PULL, 5),
    "the end of an upload in parts": (("POST", "complete-multipart"), (), 5),
}


@pytest.mark.parametrize("request_", RARE)
def test_what_only_some_runs_ask_for_is_waited_for_too(lab: Lab, request_: str) -> None:
    """These are repeated too; if a copy fails for good, the bytes are sent instead."""
    match, options, code = RARE[request_]
    hub = lab.start(xet="parts" not in request_, part_size=200_000)
    if options == PULL:
        hub.add_repo(DST, {"old.txt": b"1"})
    for action in (status(503, Retry_After=7), reset()):
        fault = hub.fault(match, action, times=None)
        # one shard at a time: a second one would ask until it hears that the run has ended
        assert lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1", *options).code == code
        assert fault.fired == hub_module.ATTEMPTS
        hub.log.clear()
        if code == 0:
            del hub.store.repos["model", DST]
    fault = hub.fault(match, html())
    lab.done(SRC, PLACE, "-k", "3", "-q", *options)
    assert fault.fired == 1


@pytest.mark.parametrize("action", [truncate(1000), truncate(200_000), stall(100_000)])
@pytest.mark.parametrize("to", ["disk", "Hub"])
def test_bytes_that_break_off_are_taken_up_again(lab: Lab, action: Action, to: str) -> None:
    """A truncated or stalled body costs another request, not the whole shard."""
    hub = lab.start()
    lab.monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 3.0)
    faults = [
        hub.fault(lambda r: r.host == "cdn" and r.headers["range"] != "bytes=0-32767", action, nth)
        for nth in (1, 3)
    ]
    target = str(lab.root / "out") if to == "disk" else PLACE
    lab.done(SRC, target, "-k", "3", "-q")
    assert [fault.fired for fault in faults] == [1, 1]
    found = {n: (lab.root / "out" / n).read_bytes() for n in SHARDS} if to == "disk" else None
    assert (found or {n: hub.read(DST, n) for n in SHARDS}) == rescaled(lab.source)
    size = sum(len(lab.source[name]) for name in SHARDS)
    assert hub.traffic("^cdn")[1] < size + len(SHARDS) * (33 << 10)


def test_a_server_that_ignores_ranges_is_read_from_the_start_only(lab: Lab) -> None:
    """200 instead of 206 counts as the whole file at byte 0, and is refused at any other offset."""
    hub = lab.start()
    hub.fault(DATA, ignore_range(), times=None)
    lab.done(SRC, str(lab.root / "whole"), "-k", "3", "-q")
    hub.log.clear()
    hub.fault(
        lambda r: r.host == "cdn" and r.headers["range"].startswith("bytes=0-4"), truncate(5000)
    )
    hub.fault(lambda r: r.headers.get("range", "").startswith("bytes=5000-"), ignore_range())
    hub.fault(
        lambda r: r.headers.get("range", "").startswith("bytes=5000-"), ignore_range(), times=None
    )
    outcome = lab.run(SRC, str(lab.root / "broken"), "-k", "3", "-q")
    assert outcome.code == 5
    assert "broke 5 times at byte 5000: the server ignored the range" in outcome.failure
    hub.log.clear()
    lab.done(SRC, str(lab.root / "broken"), "-k", "3", "-q")


def test_an_address_that_expired_is_asked_for_again(lab: Lab) -> None:
    """403 from the CDN is not final: the next attempt asks the Hub for a new address."""
    hub = lab.start()
    size = len(lab.source[SHARDS[0]])
    whole = f"bytes=0-{size - 1}"
    hub.fault(lambda r: r.host == "cdn" and r.headers["range"] == whole, truncate(50_000))
    expired = hub.fault(
        lambda r: r.headers.get("range") == f"bytes=50000-{size - 1}" and r.host == "cdn",
        run(hub.expire_links),
    )
    lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q", "-j", "1")
    assert expired.fired == 1
    assert 403 in {r.status for r in hub.find("^cdn")}


@pytest.mark.parametrize("jobs", ["1", "3"])
@pytest.mark.parametrize(
    "moment", ["a header", "a shard", "the storage", "a shard's storage", "a commit", "the end"]
)
def test_a_token_that_expires_ends_the_run_and_a_new_one_completes_it(
    lab: Lab, moment: str, jobs: str
) -> None:
    """401 during a run exits with 3 and names the token; with a new token the command resumes."""
    matches: dict[str, tuple[Match, int]] = {
        "a header": (("GET", "lab/mix/resolve/.*safetensors"), 2),
        "a shard": (("GET", "lab/mix/resolve/.*safetensors"), 5),
        "the storage": (("GET", "xet-write-token/main"), 1),
        "a shard's storage": (("GET", "xet-write-token/moescale"), 2),
        "a commit": (WORK, 3),
        "the end": (LAST, 1),
    }
    hub = lab.start(xet="http")
    match, nth = matches[moment]
    hub.fault(match, run(hub.expire), nth)
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q", "-j", jobs)
    assert outcome.code == 3, outcome.err
    assert "token" in outcome.failure
    assert sum(lab.waits) < 2  # a refusal is not an outage
    assert not hub.has(DST) or set(hub.files(DST)) == {".gitattributes"}
    lab.monkeypatch.setenv("HF_TOKEN", hub.add_token("hf_new"))
    complete(lab)


# Commits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action", [applied(500), applied(504), lost(), status(500), reset_upload(9)]
)
@pytest.mark.parametrize(
    "match", [CREATE, WORK, LAST, ("POST", "/branch/"), ("DELETE", "/branch/")]
)
def test_a_change_whose_answer_is_lost_is_not_made_twice(
    lab: Lab, match: Match, action: Action
) -> None:
    """A commit, a branch or a repo that exists although its request failed is found."""
    hub = lab.start()
    faults = [hub.fault(match, action, nth) for nth in (1, 3)]
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert faults[0].fired == 1
    assert sum(lab.waits) < 3
    check(lab)


def test_a_repo_that_is_being_made_is_waited_for_within_limits(lab: Lab) -> None:
    """The Hub creates one repo of a user at a time; if it stays busy, the run ends with 5."""
    hub = lab.start()
    text = {"error": "Cannot create repo: another conflicting operation is in progress"}
    fault = hub.fault(CREATE, status(409, text), times=None)
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert (outcome.code, fault.fired) == (5, hub_module.ATTEMPTS)
    assert "another operation is in progress" in outcome.failure
    hub.log.clear()
    hub.fault(CREATE, status(409, text), times=2)
    lab.done(SRC, PLACE, "-k", "3", "-q")
    check(lab)


def test_a_pull_request_whose_answer_is_lost_is_found(lab: Lab) -> None:
    """The run reports the pull request that exists, and opens no second one."""
    hub = lab.start()
    hub.fault(LAST, applied(500))
    outcome = lab.done(SRC, PLACE, "-k", "3", "--create-pr", "-q")
    assert [pull.num for pull in hub.repo(DST).pulls] == [1]
    assert "/discussions/1\n" in outcome.err
    assert (outcome.out, outcome.err.count("\n")) == (f"{PLACE}\n", 1)


def test_a_missing_branch_whose_answer_is_lost_is_found(lab: Lab) -> None:
    """The run uses the branch that exists, and makes no second one."""
    hub = lab.start()
    hub.fault(("POST", "/branch/k3"), lost())
    lab.done(SRC, f"{PLACE}@k3", "-k", "3", "-q")
    assert {n: hub.read(DST, n, "k3") for n in SHARDS} == rescaled(lab.source)
    assert hub.branches(DST).keys() == {"main", "k3"}


# Waiting times --------------------------------------------------------------------------------


def test_the_hub_says_how_long_to_wait(lab: Lab) -> None:
    """`Retry-After` and the Hub's own rate-limit header are honoured."""
    hub = lab.start()
    hub.fault(DATA, status(429, Retry_After=11))
    hub.fault("/tree/", status(429, RateLimit='"api";r=0;t=13'))
    hub.fault(("POST", "/preupload/"), status(503, Retry_After="soon"))
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert sorted(lab.waits) == [0.5, 11, 13]


@pytest.mark.parametrize(
    ("match", "xet"), [(DATA, True), ("/tree/", True), (WORK, True), (("PUT", "^cdn"), False)]
)
def test_a_wait_of_hours_ends_the_run(lab: Lab, match: Match, xet: bool) -> None:
    """If a server asks for more than five minutes, the run ends with 5 and the error says so."""
    hub = lab.start(xet=xet)
    hub.fault(match, status(429, Retry_After=3600), times=None)
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 5
    assert "the Hub asks to wait 3600 s" in outcome.failure
    assert not lab.waits


def test_waits_grow(lab: Lab) -> None:
    """Without a wait set by the server, waits double up to 8 seconds."""
    lab.start()

    def fail() -> None:
        raise httpx2.ReadTimeout("slow")

    with pytest.raises(TemporaryError, match=r"x: the connection broke: slow"):
        hub_module.retry(fail, "x")
    for attempt in range(4, 7):
        hub_module.wait_before_retry(attempt)
    assert lab.waits == [0.5, 1, 2, 4, 8, 8, 8]


def test_without_a_network_nothing_is_said_of_resuming(lab: Lab) -> None:
    """If no request gets an answer, the error points to the network instead."""
    lab.start()
    lab.monkeypatch.setattr(hub_module.hf_api(), "endpoint", "http://127.0.0.1:1")
    outcome = lab.run(SRC, "-k", "3", "--dry-run")
    assert outcome.code == 5
    assert f"hf://{SRC}: cannot be reached: " in outcome.failure
    assert "Check the network" in outcome.failure and "resumes" not in outcome.failure


# The client ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx2.ConnectError("no route"), "x: the connection broke: no route"),
        (httpx2.DecodingError("bad gzip"), "x: the Hub's answer is not readable: bad gzip"),
        (ValueError("not a name"), "x: not a name"),
        (PermissionError("no"), "x: not found, or the token is missing or expired (401)"),
        (OSError("Network error"), "the Hub's storage broke: Network error"),
        (RuntimeError("HTTP status server error (502 Bad Gateway)"), "storage answered 502"),
        (RuntimeError(), "x: the connection to the Hub's storage broke: RuntimeError"),
    ],
)
def test_errors_of_the_client_are_said_in_our_words(lab: Lab, error: Exception, said: str) -> None:
    """Errors of the client and of hf_xet become errors of moescale."""
    lab.start()
    with (
        pytest.raises(Exception, match=r"^x: ") as caught,
        hub_module.translated_errors("x"),
    ):
        raise error
    assert said in str(caught.value)


def test_errors_of_the_system_stay_what_they_are(lab: Lab) -> None:
    """A full disk is not a fault of the Hub."""
    lab.start()
    with pytest.raises(OSError, match="No space left"), hub_module.translated_errors("x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), hub_module.translated_errors("x"):
        raise KeyError("a bug")


def test_requests_of_others_are_left_alone(lab: Lab) -> None:
    """A program that also uses huggingface_hub keeps its own answers, with its own client."""
    hub = lab.start()
    made: list[httpx2.Client] = []

    def factory() -> httpx2.Client:
        made.append(httpx2.Client(headers={"x-mine": "1"}))
        return made[-1]

    set_client_factory(factory)
    lab.done(SRC, "-k", "3", "--dry-run")
    assert made
    assert all(r.headers.get("x-mine") == "1" for r in hub.find("^api"))
    hub.fault("/refs$", status(503))
    assert get_session().get(f"{hub.endpoint}/api/models/{SRC}/refs").status_code == 503


def test_every_request_has_a_time_limit(lab: Lab) -> None:
    """Requests of the client without a limit get a default; limits that it sets stay."""
    lab.start()
    seen: list[dict[str, float]] = []
    send: Callable[..., httpx2.Response] = httpx2.Client.send

    def spy(self: httpx2.Client, request: httpx2.Request, **more: object) -> httpx2.Response:
        seen.append(dict(request.extensions["timeout"]))
        return send(self, request, **more)

    lab.monkeypatch.setattr(httpx2.Client, "send", spy)
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert len(seen) > 20
    assert all(0 < limit <= 60 for limits in seen for limit in limits.values())
    assert {limits["read"] for limits in seen} == {10, 30, 60}
