"""Shards on the workers of a Dask cluster: separate processes, some of which die."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from distributed.cfexecutor import ClientExecutor
from support import checkpoints, hub_checkpoints
from support.dask_cluster import Wiretap, Workers, cluster, program
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, STREAM, Lab
from support.hub_faults import stall
from support.waiting import until

from moescale import errors
from moescale.api import convert, verify
from moescale.conversion import cluster as on_cluster
from moescale.conversion.executor import run_job
from moescale.conversion.run import rewrite_job
from moescale.errors import bytes_text
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.storage.base import FileRecord
from moescale.storage.hub.client import Access
from moescale.storage.hub.source import HubSource
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.journal import STATE
from moescale.storage.local.source import LocalSource
from moescale.storage.location import HubRef


@pytest.fixture(scope="module")
def running() -> Iterator[LocalCluster]:
    """Two workers for the tests from disk to disk."""
    with cluster() as running:
        yield running


@pytest.fixture
def workers(running: LocalCluster, tmp_path: Path) -> Iterator[Workers]:
    """Those workers, without the changes of other tests."""
    folder = tmp_path / "marks"
    folder.mkdir()
    workers = Workers(running, folder)
    yield workers
    workers.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three shards."""
    hub_checkpoints.model(tmp_path / "mix")
    return tmp_path / "mix"


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The output of a run on this machine alone."""
    convert(source, tmp_path / "alone", experts=3)
    return checkpoints.tree(tmp_path / "alone")


@contextmanager
def start(source: Path, out: Path, dask: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command in a separate process."""
    command = [sys.executable, "-m", "moescale", source, out, "-k", "3", "-q", "--dask", dask]
    pipe = subprocess.PIPE
    with subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def end(process: subprocess.Popen[str], code: int) -> str:
    """Wait for the command; returns its one or two lines."""
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (code, ""), err
    assert 1 <= len(err.splitlines()) <= 2, err
    assert err.startswith("moescale: ")
    return err


# Disk to disk -------------------------------------------------------------------------------


def test_a_cluster_makes_what_one_machine_makes(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, workers: Workers
) -> None:
    """Every byte is the same and reported once, and no other files remain."""
    sizes: dict[str, int] = {}

    def progress(name: str, size: int) -> None:
        sizes[name] = sizes.get(name, 0) + size

    result = convert(source, tmp_path / "out", experts=3, dask=workers.address, progress=progress)
    assert result.status == "new"
    assert checkpoints.tree(tmp_path / "out") == wanted
    expected = {f.name: result.plan.output_size(f) for f in result.plan.large_files}
    assert sizes == {name: size for name, size in expected.items() if size}


def test_a_cluster_verifies_an_output(source: Path, tmp_path: Path, workers: Workers) -> None:
    """The workers read and compare again; differences are reported as by one machine."""
    out = tmp_path / "out"
    assert convert(source, out, experts=3, dask=workers.address, verify=True).verified
    assert verify(source, out, experts=3, dask=workers.address).verified
    data = bytearray((out / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (out / SHARDS[1]).write_bytes(data)
    with pytest.raises(
        errors.VerificationError,
        match=rf"{SHARDS[1]}: differs from the plan at byte {len(data) - 1}, in",
    ):
        convert(source, out, experts=3, dask=workers.address, verify=True)


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_bounds_the_shards_in_flight(
    source: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """At most `--jobs` tasks are with the cluster at any time, however many it could run."""
    flying, most = 0, 0
    submit = ClientExecutor.submit

    def landed(_: object) -> None:
        nonlocal flying
        flying -= 1

    def counted(self: ClientExecutor, *arguments: Any) -> Any:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        future = submit(self, *arguments)
        future.add_done_callback(landed)
        return future

    monkeypatch.setattr(ClientExecutor, "submit", counted)
    workers.crawl(0.01)
    convert(source, tmp_path / "out", experts=3, dask=workers.address, jobs=jobs)
    assert most == jobs


def test_a_worker_that_is_killed_has_its_shard_redone(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, workers: Workers
) -> None:
    """The run continues with the other workers, and the output is the same."""
    workers.hold()
    out = tmp_path / "out"
    with start(source, out, workers.address) as process:
        victim = workers.writing(2)[0]
        os.kill(victim, signal.SIGKILL)
        workers.go()
        assert process.communicate(timeout=300) == (f"{out}\n", "")
    assert process.returncode == 0
    assert checkpoints.tree(out) == wanted


def test_a_shard_that_kills_its_workers_ends_the_run(
    source: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If Dask gives up on a shard, the exit code is 5, with two lines; a rerun resumes."""
    monkeypatch.setattr(workers.scheduler, "allowed_failures", 0)
    workers.hold()
    out = tmp_path / "out"
    with start(source, out, workers.address) as process:
        for victim in workers.writing(2):
            os.kill(victim, signal.SIGKILL)
        assert "1 workers died while processing it" in end(process, 5)
    workers.go()
    assert not (out / "config.json").exists()
    assert convert(source, out, experts=3).status == "resume"
    assert checkpoints.tree(out) == wanted


def test_ctrl_c_stops_the_workers_too(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, workers: Workers
) -> None:
    """The exit code is 130 at once, workers stop within seconds, and a rerun resumes."""
    workers.crawl(1.0)
    out = tmp_path / "out"
    with start(source, out, workers.address) as process:
        workers.writing(2)
        process.send_signal(signal.SIGINT)
        assert "the same command resumes" in end(process, 130)
    until(lambda: not workers.busy())  # a shard would have taken longer than that
    assert {path.name for path in (out / STATE).iterdir()} == {"journal.jsonl", "lock"}
    assert convert(source, out, experts=3).status == "resume"
    assert checkpoints.tree(out) == wanted


def test_a_run_that_is_killed_lets_the_workers_go(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, workers: Workers
) -> None:
    """Late results are ignored, and leftover files are gone after another run."""
    workers.crawl(1.0)
    out = tmp_path / "out"
    with start(source, out, workers.address) as process:
        workers.writing(2)
        process.kill()
    assert convert(source, out, experts=3).status == "resume"
    assert checkpoints.tree(out) == wanted
    until(lambda: not workers.busy())
    assert checkpoints.tree(out) == wanted


def test_an_error_of_a_worker_is_that_of_one_machine(
    source: Path, tmp_path: Path, workers: Workers
) -> None:
    """Class, message and hint are kept, with the name of the machine."""
    seen = []
    for dask in (None, workers.address):
        with pytest.raises(errors.RewriteError) as caught:
            convert(source, tmp_path / "out", factor=1e38, dask=dask, jobs=1)
        seen.append(caught.value)
    assert seen[1].message.startswith(f"{seen[0].message} (worker on ")
    assert seen[1].hint == seen[0].hint


# Hub to Hub ---------------------------------------------------------------------------------


def test_from_hub_to_hub_a_killed_worker_costs_nothing(lab: Lab) -> None:
    """Workers send shards to xet, and one commit adds them; workers never get a token.

    xet is reached over HTTP here: only one process at a time can lock a folder of it.
    """
    hub = lab.start(xet="http")
    want = lab.on_disk()
    with (
        cluster(env=hub.env(lab.root / "workers")) as running,
        Wiretap(running.scheduler_address) as tap,
    ):
        workers = Workers(running, lab.root)
        fault = hub.fault(STREAM, stall(100_000), 4)  # after the headers of the three shards
        with lab.start_child(SRC, PLACE, "-k", "3", "-q", "--dask", tap.address) as child:
            fault.wait()
            workers.kill()
            fault.release()
            assert child.communicate(timeout=300) == (f"{PLACE}\n", "")
        workers.close()
    assert lab.output() == want
    assert hub.branches(DST).keys() == {"main"}
    assert len(hub.repo(DST).history("main")) == 2
    assert hub.token.encode() not in tap.heard
    assert all(name.encode() in tap.heard for name in SHARDS)  # so it did hear


def test_without_xet_workers_upload_and_the_coordinator_commits(lab: Lab) -> None:
    """Each shard goes to the CDN once, from a worker; byte counts come back from there."""
    hub = lab.start(xet=False)
    want, total = lab.on_disk(), sum(len(lab.source[name]) for name in SHARDS)
    with cluster(env=hub.env(lab.root / "workers")) as running:
        result = convert(SRC, PLACE, experts=3, dask=running.scheduler_address)
    assert lab.output() == want
    assert len(hub.find(("PUT", "^cdn"))) == len(SHARDS)
    sent = f"{bytes_text(total)} of weights sent"
    assert any(remark.startswith(sent) for remark in result.remarks)
    assert any(re.fullmatch(r"[\d.]+ [kM]B received", remark) for remark in result.remarks)


def test_a_worker_without_a_token_is_refused(lab: Lab) -> None:
    """The error comes before a repo is created, and says how to give the worker a token."""
    hub = lab.start()
    with cluster(1, {**hub.env(lab.root / "workers"), "HF_TOKEN": ""}) as running:
        outcome = lab.run(SRC, PLACE, "-k", "3", "-q", "--dask", running.scheduler_address)
    assert outcome.code == 3
    assert "not logged in to the Hub here (worker on" in outcome.failure
    assert "Set HF_TOKEN in the worker's environment" in outcome.failure
    assert not hub.has(DST)


def test_another_hub_is_refused(lab: Lab) -> None:
    """A worker with another HF_ENDPOINT would read and write elsewhere."""
    lab.start()
    part = HubSource(HubRef(SRC)).subset([SHARDS[0]])
    pickle.loads(pickle.dumps(part)).check_reachable()
    here = Access.here()
    with pytest.raises(errors.SourceError, match="names a different Hub"):
        Access("another", here.logged_in).check_here(SRC, errors.SourceError)


# Separate programs --------------------------------------------------------------------------


SLOW_WORKER = """
import time
from moescale.storage.local import writer as local_writer
def slow(self, data, write=local_writer.LocalWriter.write):
    write(self, data)
    open({mark!r}, "w").close()
    time.sleep(0.2)
local_writer.LocalWriter.write = slow
"""


def test_scheduler_and_workers_as_programs(
    source: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """A scheduler file is an address; a worker without moescale or a lost scheduler is reported."""
    file, out, mark = tmp_path / "scheduler.json", tmp_path / "out", tmp_path / "mark"
    (tmp_path / "bare" / "moescale").mkdir(parents=True)
    (tmp_path / "bare" / "moescale" / "__init__.py").touch()
    (tmp_path / "slow.py").write_text(SLOW_WORKER.format(mark=str(mark)))
    worker = ("worker", "--scheduler-file", file, "--no-nanny", "--nthreads", "1")
    with program("scheduler", "--scheduler-file", file, "--port", "0") as scheduler:
        until(file.exists)
        with program(*worker, PYTHONPATH=str(tmp_path / "bare")), start(source, out, file) as run:
            assert "has no moescale; this is moescale" in end(run, 2)
        assert not out.exists()
        with program(*worker, "--preload", tmp_path / "slow.py"):
            with start(source, out, file) as run:
                assert run.communicate(timeout=300) == (f"{out}\n", "")
            assert checkpoints.tree(out) == wanted
            mark.unlink()
            with start(source, tmp_path / "lost", file) as run:
                until(mark.exists)
                scheduler.kill()
                assert "the scheduler is lost" in end(run, 5)


# What is refused before anything starts -----------------------------------------------------


def test_another_version_is_refused(
    source: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with another version of moescale would write other bytes."""
    monkeypatch.setattr(on_cluster, "__version__", "9.9")
    with pytest.raises(errors.UsageError, match=r"worker tcp://.* has moescale .*; this is 9\.9"):
        convert(source, tmp_path / "out", experts=3, dask=workers.address)
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_not_shared_is_refused(
    source: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not find this run's marker sees another folder; old content stays."""
    share = LocalDestination.prepare_for_workers

    def elsewhere(self: LocalDestination) -> None:
        share(self)
        assert self._marker is not None
        self._marker.unlink()

    convert(source, tmp_path / "out", experts=2, factor=2.0)
    before = checkpoints.tree(tmp_path / "out")
    monkeypatch.setattr(LocalDestination, "prepare_for_workers", elsewhere)
    with pytest.raises(errors.DestinationError, match=r"out: cannot be reached \(worker on \S+\)"):
        convert(source, tmp_path / "out", experts=3, dask=workers.address, overwrite=True)
    assert checkpoints.tree(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["another", "missing"])
def test_a_source_that_is_not_shared_is_refused(
    source: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Every worker must find each file with the same size and time."""
    only = LocalSource.subset

    def elsewhere(self: LocalSource, names: Any) -> LocalSource:
        part = only(self, names)
        if change == "missing":
            part.root = tmp_path / "nowhere"
        else:
            part._states[SHARDS[0]] = [1, 2]
        return part

    monkeypatch.setattr(LocalSource, "subset", elsewhere)
    why = (
        "cannot be reached: No such file"
        if change == "missing"
        else f"{SHARDS[0]}: is a different file"
    )
    with pytest.raises(errors.SourceError, match=rf"{why}.*\(worker on \S+\)"):
        convert(source, tmp_path / "out", experts=3, dask=workers.address)
    assert not (tmp_path / "out" / STATE).exists()


def test_a_worker_that_comes_later_is_refused_too(
    source: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task contains its version, so it does not matter which workers were asked first."""
    monkeypatch.setattr(on_cluster, "_check_versions", lambda client: None)
    monkeypatch.setattr(on_cluster, "__version__", "9.9")
    with pytest.raises(errors.UsageError, match=r"a worker has moescale .*, not 9\.9 \(worker on"):
        convert(source, tmp_path / "out", experts=3, dask=workers.address)


def test_a_run_does_not_wait_for_workers_for_ever(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there has been no worker for a long time, the error says so, and a rerun resumes."""
    monkeypatch.setattr(on_cluster, "WORKER_CHECK_SECONDS", 0.0)
    with on_cluster.connect(workers.address) as found:
        assert found.default_jobs(LocalDestination(tmp_path)) == 2
        found.check_alive()
        monkeypatch.setattr(found._client, "nthreads", dict)
        found.check_alive()
        monkeypatch.setattr(on_cluster, "NO_WORKER_SECONDS", 0.0)
        with pytest.raises(errors.TemporaryError, match="no worker is left"):
            found.check_alive()


@pytest.mark.parametrize(
    ("place", "error", "why"),
    [
        ("nowhere.json", errors.UsageError, "neither an address .* nor a scheduler file"),
        ("carrier-pigeon://x", errors.UsageError, "carrier-pigeon"),
        ("tcp://127.0.0.1:1", errors.TemporaryError, "no scheduler answers"),
    ],
)
def test_a_scheduler_that_is_not_there(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: type[errors.MoescaleError],
    why: str,
) -> None:
    """An invalid address is a usage error; an address without an answer may work later."""
    monkeypatch.setattr(on_cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(error, match=why):
        convert(source, tmp_path / "out", experts=3, dask=place)
    assert not (tmp_path / "out").exists()


# What is sent -------------------------------------------------------------------------------


def test_a_job_is_one_shard(source: Path, tmp_path: Path) -> None:
    """A job names only the tensors of its own shard, and is small."""
    reader = LocalSource(source)
    plan = make_plan(reader, Options(experts=3))
    files = {file.name: file for file in plan.large_files}
    destination = LocalDestination(tmp_path / "out")
    job = rewrite_job(files[SHARDS[0]], plan, reader, destination.writers)
    sent = pickle.dumps((run_job, job, on_cluster._WorkerMonitor("1", "t", job.name)))
    names = {t.shard: t.tensor.name.encode() for t in plan.changed_tensors}
    assert names[SHARDS[0]] in sent
    assert not any(names[other] in sent or other.encode() in sent for other in SHARDS[1:])
    assert len(sent) < 3000


def test_without_dask_nothing_of_it_is_imported(source: Path, tmp_path: Path) -> None:
    """A run without --dask does not import dask or distributed."""
    code = (
        "import sys; from moescale.api import convert\n"
        "convert(sys.argv[1], sys.argv[2], experts=3, verify=True)\n"
        "print([name for name in ('dask', 'distributed', 'tornado') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_the_extra_is_named_where_it_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without distributed, --dask says what to install."""
    monkeypatch.delitem(sys.modules, "moescale.conversion.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(errors.UsageError, match=r"pip install distributed"):
        convert(source, tmp_path / "out", experts=3, dask="tcp://127.0.0.1:1")


# Attempts -----------------------------------------------------------------------------------


def test_two_attempts_at_a_shard_do_not_meet(tmp_path: Path) -> None:
    """A worker that is believed dead and still writes has a separate file that is not used."""
    destination = LocalDestination(tmp_path / "out")
    destination.begin({}, replace=False)
    destination.prepare_for_workers()
    lost, again = (pickle.loads(pickle.dumps(destination.writers)) for _ in range(2))
    with lost.open("x.bin", 6) as zombie:
        zombie.write(memoryview(b"dea"))
        with again.open("x.bin", 6) as writer:
            writer.write(memoryview(b"living"))
            made = writer.finish()
        assert destination.commit_file("x.bin", made) == FileRecord(6)
        zombie.write(memoryview(b"d!!"))
        zombie.finish()
    assert (destination.root / "x.bin").read_bytes() == b"living"
    destination.publish({"config.json": b"{}"}, frozenset({"x.bin", "config.json"}))
    destination.close()
    assert {path.name for path in destination.root.iterdir()} == {"x.bin", "config.json"}
    with pytest.raises(errors.DestinationError, match="cannot be reached"), again.open("y", 1):
        pass


def test_a_file_that_is_short_where_it_is_named_is_refused(tmp_path: Path) -> None:
    """If a file system does not show all that a worker wrote, no incomplete shard is accepted."""
    destination = LocalDestination(tmp_path / "out")
    destination.begin({}, replace=False)
    with destination.writers.open("x.bin", 6) as writer:
        writer.write(memoryview(b"abcdef"))
        made = writer.finish()
    os.truncate(destination.root / STATE / made.handle, 3)
    with pytest.raises(errors.RewriteError, match="size differs between"):
        destination.commit_file("x.bin", made)
    destination.close()
    assert destination.existing() == {}


@pytest.mark.parametrize("kind", [e for e in vars(errors).values() if isinstance(e, type)])
def test_an_error_can_be_sent(kind: type[errors.MoescaleError]) -> None:
    """Message and hint of every error can be sent from a worker."""
    error = pickle.loads(pickle.dumps(kind("what", hint="how")))
    assert (type(error), error.message, error.hint) == (kind, "what", "how")
