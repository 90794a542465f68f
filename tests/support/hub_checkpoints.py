"""For tests of the Hub: a loopback Hub with a checkpoint, and ways to run the command on it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import checkpoints
from support.command import Done, exit_code
from support.hub_client import connected
from support.hub_server import Content, Hub

SRC, DST = "lab/mix", "me/out"
PLACE = f"hf://{DST}"
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
FACTOR = 1.5**0.5
HIDDEN, INNER = 96, 256
STREAM = r"^cdn /\w"
"""Requests for the contents of large files."""

CARD = checkpoints.CARD.replace("   # as upstream", "").encode()

QUICK_XET = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
"""Settings that shorten the waits of `hf_xet`."""

KEPT = [*(name for name in checkpoints.EXTRAS if name != "README.md"), "config.json"]


def tensors(seed: int = 0, layers: int = 2, experts: int = 4) -> dict[str, checkpoints.Raw]:
    """The tensors of a small Mixtral, each of about 50 kB."""
    names = ["model.embed_tokens.weight", *checkpoints.mixtral_names(layers, experts)]

    def shape(name: str) -> tuple[int, int]:
        if name.endswith("gate.weight"):
            return experts, HIDDEN
        return (HIDDEN, INNER) if ".w2." in name else (INNER, HIDDEN)

    return {n: checkpoints.values("BF16", shape(n), 100 * seed + i) for i, n in enumerate(names)}


def model(folder: Path, seed: int = 0) -> dict[str, Content]:
    """Write a complete repo with three shards; return its files."""
    checkpoints.write_shards(folder, tensors(seed), len(SHARDS))
    config = checkpoints.MIXTRAL_CONFIG.replace('"hidden_size": 8', f'"hidden_size": {HIDDEN}')
    (folder / "config.json").write_bytes(config.encode())
    extras = {**checkpoints.EXTRAS, "README.md": CARD}
    checkpoints.write_files(folder, extras)
    return {name: folder / name for name in checkpoints.tree(folder)}


def rescaled(files: Mapping[str, bytes], factor: float = FACTOR) -> dict[str, bytes]:
    """The shards that the output must have, computed without moescale."""
    return {
        name: checkpoints.rescaled(
            data, dict.fromkeys(checkpoints.routed(checkpoints.spans(data)), factor)
        )
        for name, data in files.items()
        if name in SHARDS
    }


class Outcome(Done):
    """The result of a run of the command."""

    @property
    def failure(self) -> str:
        """The message of a failed run; it must have one or two lines and no traceback."""
        lines = self.err.strip().splitlines()
        assert 1 <= len(lines) <= 2, self.err
        assert lines[0].startswith("moescale: "), self.err
        return "\n".join(lines)


class Lab:
    """A Hub with a source repo, and ways to run the command on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.folder = root / "mix"
        self.waits: list[float] = []
        self.files: dict[str, Content] = {}
        self._stack = stack
        self.hub: Hub

    def start(self, model_in: Path | None = None, **settings: Any) -> Hub:
        """Start the Hub with the checkpoint as `SRC`."""
        self.hub = self._stack.enter_context(Hub(self.root / "hub", **settings))
        self._stack.enter_context(connected(self.hub, self.root / "home", self.monkeypatch))
        self._stack.callback(_reset_client)
        _reset_client()
        for wait in ("moescale.storage.hub.client.sleep", "huggingface_hub.utils._http.time.sleep"):
            self.monkeypatch.setattr(wait, self.waits.append)
        for name, value in QUICK_XET.items():
            self.monkeypatch.setenv(name, value)
        self.files = model(self.folder)
        self.commit = self.hub.add_repo(SRC, self.files)
        self.hub.log.clear()
        return self.hub

    @property
    def source(self) -> dict[str, bytes]:
        """The contents of the source."""
        return checkpoints.tree(self.folder)

    def run(self, *arguments: str) -> Outcome:
        """Run the command in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = exit_code(self.monkeypatch, *arguments)
        assert self.hub.token not in out.getvalue() + err.getvalue()
        return Outcome(code, out.getvalue(), err.getvalue())

    def done(self, *arguments: str) -> Outcome:
        """Run the command in this process; it must succeed."""
        outcome = self.run(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    def start_child(
        self, *arguments: str, home: str = "home", terminal: int | None = None, **more: str
    ) -> subprocess.Popen[str]:
        """Start the command in a separate process; a new `home` acts as another machine.

        Its output goes to pipes, or to a terminal.
        """
        environment = {**self.hub.env(self.root / home), **more}
        return subprocess.Popen(
            [sys.executable, "-m", "moescale", *arguments],
            env=environment,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
        )

    def child(self, *arguments: str, home: str = "home", **more: str) -> Outcome:
        """Run the command in a separate process."""
        with self.start_child(*arguments, home=home, **more) as process:
            out, err = process.communicate(timeout=300)
        return Outcome(process.returncode, out, err)

    def fill_cache(self, *patterns: str) -> None:
        """Download the source, or the files that match, into the Hub cache."""
        from huggingface_hub import constants, snapshot_download

        with self.monkeypatch.context() as context:
            context.setattr(constants, "HF_HUB_DISABLE_XET", True)
            snapshot_download(SRC, endpoint=self.hub.endpoint, allow_patterns=patterns or None)

    def output(self, repo: str = DST, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repo on the Hub."""
        return {
            name: self.hub.read(repo, name, revision) for name in self.hub.files(repo, revision)
        }

    def on_disk(self, *arguments: str) -> dict[str, bytes]:
        """The output of the same job on disk; the log of the Hub stays as it was."""
        target = self.root / "on-disk"
        self.done(SRC, str(target), "-k", "3", "-q", *arguments)
        self.hub.log.clear()
        return checkpoints.tree(target)


def _reset_client() -> None:
    """Make the next request build a client for the current endpoint."""
    from huggingface_hub.utils import _http

    from moescale.storage.hub import client as hub

    hub.hf_api.cache_clear()
    _http.set_client_factory(_http.default_client_factory)


@contextmanager
def laboratory(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A laboratory; waits are recorded, not waited."""
    from huggingface_hub.utils import logging

    with ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()  # as the command does
        yield Lab(root, monkeypatch, stack)


def large_shard(path: Path, size: int, seed: int | None = 0) -> None:
    """Write a Mixtral of one layer as one shard of about `size` bytes; zeros without a seed."""
    matrix = (2048, 2048)  # square, so that one shape fits all three
    count = max(1, size // (3 * 2 * matrix[0] * matrix[1]))
    names = [
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight"
        for e in range(count)
        for w in (1, 2, 3)
    ]
    entries: dict[str, Any] = {}
    for number, name in enumerate(names):
        first = number * 2 * matrix[0] * matrix[1]
        offsets = [first, first + 2 * matrix[0] * matrix[1]]
        shape = list(matrix if ".w2." in name else matrix[::-1])
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    rng = None if seed is None else np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(checkpoints.header(entries))
        for _ in names:
            if rng is None:
                file.seek(2 * matrix[0] * matrix[1], os.SEEK_CUR)
            else:
                codes = rng.integers(0, 1 << 16, matrix[0] * matrix[1], np.uint16) & 0xBFFF
                file.write(codes.tobytes())
        file.truncate(file.tell())
