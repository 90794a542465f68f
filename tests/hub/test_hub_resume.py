"""Runs that are killed, stopped or overtaken, and the runs that resume them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import checkpoints
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, STREAM, Lab, rescaled
from support.hub_faults import Action, Fault, Match, Request, lost, reset, run, stall, status
from support.waiting import until

from moescale.storage.local.journal import JOURNAL as LOCAL_JOURNAL
from moescale.storage.local.journal import STATE

WORKING = "moescale-unfinished-main"
WORK = ("POST", f"/commit/{WORKING}")
LAST = ("POST", r"/commit/main")
JOURNAL = "moescale-journal.json"
INTERRUPTED = "moescale: interrupted; the same command resumes"

PATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "600", "HF_XET_CLIENT_READ_TIMEOUT": "600s"}
"""Settings with which a hanging request does not end by itself during a test."""


def finished(lab: Lab) -> set[str]:
    """The shards that the journal on the Hub lists."""
    if not lab.hub.has(DST) or WORKING not in lab.hub.branches(DST):
        return set()
    if JOURNAL not in lab.hub.files(DST, WORKING):
        return set()
    return set(json.loads(lab.hub.read(DST, JOURNAL, WORKING))["files"])


def streamed(lab: Lab) -> set[str]:
    """The shards of which more than the header was requested."""
    digests = {lab.hub.files(SRC, lab.commit)[name].sha256: name for name in SHARDS}
    asked = {
        r.path[1:65]
        for r in lab.hub.find(STREAM)
        if r.method == "GET" and r.headers.get("range") != "bytes=0-32767"
    }
    return {name for digest, name in digests.items() if digest in asked}


def another_machine(lab: Lab) -> None:
    """Remove the client's files from the disk."""
    lab.monkeypatch.setenv("HF_HOME", str(lab.root / f"home-{time.monotonic_ns()}"))


def kill(
    lab: Lab,
    match: Match,
    action: Action,
    nth: int,
    *arguments: str,
    done: Callable[[], bool] = lambda: True,
) -> Fault:
    """Run the command in a child that is killed when a request meets the fault.

    A shard is listed as finished while the next one is under way, so the kill waits for `done`.
    """
    fault = lab.hub.fault(match, action, nth, times=None)
    options = ("-k", "3", "-q", "-j", "1")
    with lab.start_child(SRC, *arguments, *options, **PATIENT) as process:
        fault.wait()
        until(lambda: done() or process.poll() is not None)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    fault.release()
    return fault


def complete(lab: Lab, want: dict[str, bytes], place: str = PLACE, branch: str = "main") -> None:
    """Run the command again on another machine; it must not repeat finished shards."""
    there = finished(lab)
    lab.hub.log.clear()
    another_machine(lab)
    lab.done(SRC, place, "-k", "3", "-q")
    assert not streamed(lab) & there
    assert lab.output(revision=branch) == want
    assert lab.hub.branches(DST).keys() == {"main", branch}
    assert len(lab.hub.repo(DST).history(branch)) == 2


# Kills --------------------------------------------------------------------------------------

KILLS: dict[str, tuple[Match, Action, int, int]] = {
    "after the repo was created": (("POST", "repos/create"), stall(), 1, 0),
    "after the working branch": (("POST", "/branch/"), stall(), 1, 0),
    "after the first journal": (WORK, stall(), 1, 0),
    "in the middle of a download": (
        lambda r: r.host == "cdn" and r.headers.get("range") != "bytes=0-32767",
        stall(200_000),
        2,
        1,
    ),
    "in the middle of an upload": (("POST", "^cas /v1/xorbs"), stall(), 2, 1),
    "before a shard was committed": (WORK, status(503, Retry_After=100), 3, 1),
    "after one shard": (WORK, stall(), 2, 1),
    "after two shards": (WORK, stall(), 3, 2),
    "after three shards": (WORK, stall(), 4, 3),
    "before the last commit": (LAST, status(503, Retry_After=100), 1, 3),
    "after the last commit": (LAST, stall(), 1, 3),
    "while cleaning up": (("DELETE", f"/branch/{WORKING}"), status(503, Retry_After=100), 2, 3),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_is_continued_on_another_machine(lab: Lab, moment: str) -> None:
    """Whatever the moment, finished shards are not read again and the output is the same."""
    hub = lab.start(xet="http")
    want = lab.on_disk()
    match, action, nth, count = KILLS[moment]
    kill(lab, match, action, nth, PLACE, done=lambda: len(finished(lab)) >= count)
    assert len(finished(lab)) == count
    last = moment in ("after the last commit", "while cleaning up")
    assert ("config.json" in hub.files(DST)) == last
    complete(lab, want)


@pytest.mark.parametrize(
    ("match", "action"),
    [
        (("POST", "/commit/moescale-finished-k3"), stall()),
        (("POST", "/branch/k3"), stall()),
        (("POST", "/branch/k3"), status(503, Retry_After=100)),
    ],
)
def test_a_killed_run_for_a_missing_branch_is_continued(
    lab: Lab, match: Match, action: Action
) -> None:
    """Between the last commit and the branch, and after it, nothing is lost or repeated."""
    hub = lab.start()
    hub.add_repo(DST, {".gitattributes": b"", "old.txt": b"1"})
    want = lab.on_disk()
    kill(lab, match, action, 1, f"{PLACE}@k3")
    hub.log.clear()
    another_machine(lab)
    lab.done(SRC, f"{PLACE}@k3", "-k", "3", "-q")
    assert not streamed(lab)
    assert lab.output(revision="k3") == want
    assert hub.branches(DST).keys() == {"main", "k3"}


def test_a_killed_run_without_xet_is_continued(lab: Lab) -> None:
    """A kill during an upload from a file leaves no file, and costs only that shard."""
    lab.start(xet=False)
    want = lab.on_disk()
    temporary = lab.root / "tmp"
    temporary.mkdir()
    lab.monkeypatch.setenv("TMPDIR", str(temporary))
    kill(lab, ("PUT", "^cdn"), stall(), 2, PLACE, done=lambda: bool(finished(lab)))
    assert not list(temporary.iterdir())
    assert finished(lab) == {SHARDS[0]}
    complete(lab, want)


def test_a_pull_request_is_opened_once(lab: Lab) -> None:
    """A run that is killed after its pull request was opened does not open another one."""
    hub = lab.start()
    hub.add_repo(DST, {".gitattributes": b""})
    kill(lab, LAST, stall(), 1, PLACE, "--create-pr")
    hub.log.clear()
    another_machine(lab)
    outcome = lab.done(SRC, PLACE, "-k", "3", "--create-pr")
    assert [pull.num for pull in hub.repo(DST).pulls] == [1]
    assert f"/{DST}/discussions/1\n" in outcome.err
    assert not streamed(lab)
    assert hub.branches(DST).keys() == {"main"}


def test_a_killed_run_to_disk_fetches_the_rest_only(lab: Lab) -> None:
    """From the Hub to disk, finished shards are not fetched again either."""
    hub = lab.start()
    want = lab.on_disk()
    target = lab.root / "out"
    match, action, _, _ = KILLS["in the middle of a download"]
    journal = target / STATE / LOCAL_JOURNAL

    def is_in_journal() -> bool:
        _, *files, _ = journal.read_text().split("\n")  # the job, and the start of a line
        return any(SHARDS[1] in line for line in files)

    kill(lab, match, action, 3, str(target), done=is_in_journal)
    assert not (target / "config.json").exists()
    hub.log.clear()
    lab.done(SRC, str(target), "-k", "3", "-q")
    assert streamed(lab) == {SHARDS[2]}
    assert checkpoints.tree(target) == want


@pytest.mark.parametrize("xet", [True, False])
def test_a_run_that_is_cut_off_after_any_change_is_continued(lab: Lab, xet: bool) -> None:
    """For every k: the k-th change arrives, then the Hub stops answering; a rerun completes.

    The run that is cut off ends with 5 and an error of two lines.
    """
    hub = lab.start(xet=xet)
    want = lab.on_disk()

    def changes(request: Request) -> bool:
        return request.method in ("POST", "DELETE") and "validate-yaml" not in request.path

    for number in range(1, 100) if xet else range(2, 100, 4):
        hub.store.repos.pop(("model", DST), None)
        hub.log.clear()
        cut = hub.fault(changes, lost(), nth=number)
        hub.fault(lambda request, cut=cut: cut.fired > 0, reset(), times=None)
        outcome = lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1")
        if not cut.fired:
            break
        assert outcome.code == 5
        assert "the same command again" in outcome.failure
        names = set(hub.files(DST)) if hub.has(DST) else set()
        assert names in (set(), {".gitattributes"}, set(want))
        complete(lab, want)
    assert number > 10


# Stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (signal.SIGINT, ("POST", "^cas /v1/xorbs")),
        (signal.SIGTERM, ("POST", "^cas /v1/shards")),
        (signal.SIGINT, STREAM),
        (signal.SIGTERM, WORK),
    ],
)
def test_a_stopped_run_ends_at_once(lab: Lab, number: signal.Signals, match: Match) -> None:
    """Ctrl-C and SIGTERM end a run whose request hangs, with 130."""
    hub = lab.start(xet="http")
    nth = 4 if match == STREAM else 1
    fault = hub.fault(match, stall(), nth, times=None)
    with lab.start_child(SRC, PLACE, "-k", "3", "-q", **PATIENT) as process:
        fault.wait()
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    first, *cost = err.splitlines()
    assert (process.returncode, first) == (130, INTERRUPTED)
    assert len(cost) <= 1  # the line about what must be repeated
    fault.release()
    hub.log.clear()
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)


def test_a_dry_run_that_hangs_can_be_stopped(lab: Lab) -> None:
    """Ctrl-C ends a dry run while it reads headers."""
    fault = lab.start().fault(STREAM, stall(), times=None)
    with lab.start_child(SRC, "-k", "3", "--dry-run", **PATIENT) as process:
        fault.wait()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", f"{INTERRUPTED}\n")


# Other jobs ---------------------------------------------------------------------------------


def leave_unfinished(lab: Lab, place: str = PLACE, *arguments: str) -> set[str]:
    """Leave a run with one finished shard, as when a token expires."""
    fault = lab.hub.fault(WORK, status(403), nth=3, times=None)
    outcome = lab.run(SRC, place, "-k", "3", "-q", "-j", "1", *arguments)
    assert outcome.code == 3
    assert fault.fired in (1, 2)  # the other shard, if it was finished by then, is tried too
    lab.hub.log.clear()
    return finished(lab)


def other_version(lab: Lab) -> None:
    """Change the version of the program."""
    lab.monkeypatch.setattr("moescale.planning.provenance.__version__", "99.0")


def other_commit(lab: Lab) -> None:
    """Move the source's branch to another commit."""
    lab.hub.commit(SRC, {"LICENSE": b"another licence\n"})


OTHER_JOBS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "options": (None, ("-k", "4"), "other options"),
    "factor": (None, ("--factor", "2"), "other options"),
    "commit": (other_commit, ("-k", "3"), "another source, or one that has changed"),
    "version": (other_version, ("-k", "3"), "another version"),
}


@pytest.mark.parametrize("other", OTHER_JOBS)
def test_an_unfinished_run_of_another_job_is_refused(lab: Lab, other: str) -> None:
    """Other options, commits or versions are refused with the reason; --overwrite replaces them."""
    hub = lab.start()
    change, options, said = OTHER_JOBS[other]
    assert leave_unfinished(lab) == {SHARDS[0]}
    if change:
        change(lab)
    before = hub.branches(DST)
    outcome = lab.run(SRC, PLACE, *options, "-q")
    assert outcome.code == 3
    assert f"holds an unfinished run of {said}" in outcome.failure
    assert "--overwrite" in outcome.failure
    assert hub.branches(DST) == before
    hub.log.clear()
    lab.done(SRC, PLACE, *options, "-q", "--overwrite", "--verify")
    assert streamed(lab) == set(SHARDS)
    assert hub.branches(DST).keys() == {"main"}


def test_a_branch_that_moved_meanwhile_is_not_overrun(lab: Lab) -> None:
    """Another user's commit between two runs stops the second; `--overwrite` continues from it."""
    hub = lab.start()
    want = lab.on_disk()
    leave_unfinished(lab)
    hub.commit(DST, {"rival.txt": b"1"})
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 3
    assert "changed since the unfinished run began" in outcome.failure
    assert set(hub.files(DST)) == {".gitattributes", "rival.txt"}
    hub.log.clear()
    lab.done(SRC, PLACE, "-k", "3", "-q", "--overwrite")
    assert streamed(lab) == set(SHARDS[1:])
    assert lab.output() == want


def test_a_rival_in_the_last_moment_is_not_overrun(lab: Lab) -> None:
    """A commit of another user just before the last one ends the run, and nothing is lost."""
    hub = lab.start()
    want = lab.on_disk()
    hub.fault(LAST, run(lambda: hub.commit(DST, {"rival.txt": b"1"})))
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 3
    assert "someone else has changed the branch (412)" in outcome.failure
    assert set(hub.files(DST)) == {".gitattributes", "rival.txt"}
    hub.log.clear()
    again = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert again.code == 3
    lab.done(SRC, PLACE, "-k", "3", "-q", "--overwrite")
    assert not streamed(lab)
    assert lab.output() == want


def test_a_rival_who_brings_the_same_shards_is_not_overrun(lab: Lab) -> None:
    """The run stops even if the other commit differs only in small files."""
    hub = lab.start()
    fault = hub.fault(LAST, status(403))
    assert lab.run(SRC, PLACE, "-k", "3", "-q").code == 3
    assert fault.fired == 1
    shards = {name: hub.read(DST, name, WORKING) for name in SHARDS}
    hub.commit(DST, {**shards, "README.md": b"# Mine\n"})
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 3
    assert "changed since the unfinished run began" in outcome.failure
    assert hub.read(DST, "README.md") == b"# Mine\n"


def test_a_shard_that_is_not_what_the_journal_says_is_done_again(lab: Lab) -> None:
    """A shard counts only if the working branch agrees with the journal."""
    hub = lab.start()
    leave_unfinished(lab)
    hub.commit(DST, {SHARDS[0]: b"something else"}, branch=WORKING)
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert streamed(lab) == set(SHARDS)
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)


DAMAGED: dict[str, Any] = {
    "a list": [],
    "nothing": None,
    "an entry without anything": {SHARDS[0]: {}},
    "entries of other kinds": {SHARDS[0]: [], SHARDS[1]: 3, SHARDS[2]: None},
    "a size as text": {SHARDS[0]: {"size": "1", "sha256": "0" * 64}},
    "a digest that is none": {SHARDS[0]: {"size": 1, "sha256": ["0"]}},
    "a name outside": {"../x": {"size": 1, "sha256": "0" * 64}, "": {"size": 1, "sha256": None}},
}


@pytest.mark.parametrize("files", DAMAGED)
def test_what_a_damaged_journal_lists_is_done_again(lab: Lab, files: str) -> None:
    """A journal of the same job whose entries have wrong types lists no files."""
    hub = lab.start()
    leave_unfinished(lab)
    journal = json.loads(hub.read(DST, JOURNAL, WORKING))
    damaged = json.dumps({**journal, "files": DAMAGED[files]}).encode()
    hub.commit(DST, {JOURNAL: damaged}, branch=WORKING)
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert streamed(lab) == set(SHARDS)
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)


def test_of_two_runs_at_once_one_ends(lab: Lab) -> None:
    """A second run of the same job takes over; the first one notices and ends with an error."""
    hub = lab.start(xet="http")
    want = lab.on_disk()
    fault = hub.fault(("POST", "^cas /v1/shards"), stall())
    process: subprocess.Popen[str]
    with lab.start_child(SRC, PLACE, "-k", "3", "-q", "-j", "1") as process:
        fault.wait()
        another_machine(lab)
        lab.done(SRC, PLACE, "-k", "3", "-q")
        fault.release()
        _, err = process.communicate(timeout=120)
    assert process.returncode in (3, 5)
    assert 1 <= len(err.splitlines()) <= 2
    assert lab.output() == want
    assert hub.branches(DST).keys() == {"main"}


def test_a_resumed_run_says_so(lab: Lab) -> None:
    """The summary of a resumed run says so, and its rate is that of the rest."""
    lab.start()
    leave_unfinished(lab)
    last = lab.done(SRC, PLACE, "-k", "3").err.partition(f"{PLACE} resumed and finished: ")[2]
    assert re.match(
        r"1\.2 MB in all, [\d.]+ kB existed, the rest in [\d.]+ s \([\d.]+ [kM]B/s\),"
        r" 8 tensors scaled\.\n",
        last,
    )
