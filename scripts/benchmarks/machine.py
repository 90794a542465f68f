"""The machine: what it is, and what a process costs on it."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def describe_machine() -> str:
    """System, processor, cores, memory and Python, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB,"
        f" Python {platform.python_version()}"
    )


def file_system(path: Path) -> str:
    """The type of the file system of `path`."""
    answer = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown file system"


def in_child(function: Callable[..., None], *arguments: object) -> None:
    """Run a function in a new process, so that its memory does not count for the measured ones."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit("the model could not be made")


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of a whole process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    message = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed: {message.decode()}")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return seconds, usage.ru_maxrss / unit


def timed_twice(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak MiB of a whole process."""
    before = os.times()
    wall, peak = timed(command)
    after = os.times()
    busy = after.children_user + after.children_system
    return wall, busy - before.children_user - before.children_system, peak
