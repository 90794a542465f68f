"""A Dask cluster of separate processes on loopback, and ways to hold, slow and kill workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

from moescale.checkpoint import rewrite
from moescale.storage.local import writer as local_writer
from support.waiting import until

WRITE, PIECE = local_writer.LocalWriter.write, rewrite.EDIT_PIECE


@contextmanager
def cluster(workers: int = 2, env: Mapping[str, str] | None = None) -> Iterator[LocalCluster]:
    """Start workers with one process and one thread each; a nanny restarts dead ones."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        dask.config.set({"temporary-directory": scratch}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # otherwise its server takes a fixed port
            silence_logs=50,
            env=dict(env or {}),
        ) as running,
    ):
        yield running


@contextmanager
def program(*command: str | Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a Dask program in a separate process, and end it."""
    program = Path(sys.executable).with_name("dask")
    with tempfile.TemporaryDirectory() as scratch:
        child = subprocess.Popen(
            [program, *command, "--host", "127.0.0.1", "--no-dashboard"],
            env={**os.environ, "DASK_TEMPORARY_DIRECTORY": scratch, **more},
            stderr=subprocess.DEVNULL,
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait()


# On the workers -----------------------------------------------------------------------------


def _hold(folder: Path) -> None:
    """Make every write leave a file named after the process, and wait for the file ``go``."""

    def write(self: local_writer.LocalWriter, data: memoryview) -> None:
        WRITE(self, data)
        (folder / str(os.getpid())).touch()
        until((folder / "go").exists)

    local_writer.LocalWriter.write = write  # type: ignore[method-assign]


def _crawl(folder: Path, seconds: float) -> None:
    """Make every write short and slow, and leave a file named after the process."""

    def write(self: local_writer.LocalWriter, data: memoryview) -> None:
        WRITE(self, data)
        (folder / str(os.getpid())).touch()
        time.sleep(seconds)

    local_writer.LocalWriter.write = write  # type: ignore[method-assign]
    rewrite.EDIT_PIECE = 4096


def _restore() -> None:
    local_writer.LocalWriter.write = WRITE  # type: ignore[method-assign]
    rewrite.EDIT_PIECE = PIECE


def _is_busy(dask_worker: Any) -> bool:
    return bool(dask_worker.active_threads)


class Workers:
    """The workers of a cluster, seen from a test."""

    def __init__(self, running: LocalCluster, folder: Path) -> None:
        self.address: str = running.scheduler_address
        self.scheduler = running.scheduler
        self._folder = folder
        self._client = Client(running, set_as_default=False)
        self._client.wait_for_workers(len(running.workers))  # one may be restarting

    def hold(self) -> None:
        """Hold up every write until `go`."""
        self._client.run(_hold, self._folder)

    def crawl(self, seconds: float) -> None:
        """Slow every write down."""
        self._client.run(_crawl, self._folder, seconds)

    def go(self) -> None:
        """Let the writes that are held up continue."""
        (self._folder / "go").touch()

    def writing(self, count: int = 1) -> list[int]:
        """Wait until this number of processes have written; return their ids."""

        def found() -> list[int]:
            pids = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
            return pids if len(pids) >= count else []

        return list(until(found))

    def kill(self) -> None:
        """Kill every worker."""
        for pid in self._client.run(os.getpid).values():
            os.kill(pid, signal.SIGKILL)

    def busy(self) -> bool:
        """Whether the thread of a worker runs a task, even a cancelled one."""
        return any(self._client.run(_is_busy).values())

    def close(self) -> None:
        """Undo what was done to the workers."""
        self.go()
        self._client.run(_restore, on_error="ignore")
        self._client.close()


# What is sent -------------------------------------------------------------------------------


class Wiretap:
    """A proxy in front of a scheduler that keeps all bytes sent to it."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        self._target = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._server]
        self.heard = bytearray()
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for one, other, keep in ((near, far, True), (far, near, False)):
                    threading.Thread(
                        target=self._pass, args=(one, other, keep), daemon=True
                    ).start()

    def _pass(self, one: socket.socket, other: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if keep:
                    self.heard += data
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(self, *_: object) -> None:
        for open_socket in self._sockets:
            open_socket.close()
