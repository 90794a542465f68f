"""Properties that hold for any bytes; the tests and ``scripts/fuzz.py`` use them.

Each function takes the bytes of one hostile file, and asserts that moescale either takes them as
other readers do, or raises one of its own errors, whose message is one printable line.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors

from moescale.checkpoint.gguf.header import parse_header as parse_gguf
from moescale.checkpoint.json_text import parse_lenient, value_spans
from moescale.checkpoint.safetensors.header import header_length, parse_header
from moescale.checkpoint.safetensors.index import parse_index
from moescale.checkpoint.tensor import Header
from moescale.conversion import card
from moescale.errors import CheckpointError, DestinationError, MoescaleError, UsageError
from moescale.families import architectures
from moescale.families.architectures import Architecture
from moescale.options import Options, parse_factors
from moescale.planning import provenance
from moescale.planning.decide import make_plan
from moescale.planning.plan import Plan
from moescale.report import terminal
from moescale.storage.base import FileInfo, SourceId
from moescale.storage.gguf_set import GgufSet
from moescale.storage.local.journal import Journal
from moescale.storage.local.source import LocalSource
from moescale.storage.reader import FileReader
from moescale.version import __version__

NAME = "model-00001-of-00002.safetensors"
STRICTER = ("occurs twice", "needs exactly", "too large", "-0 is not an integer")
"""Headers that safetensors accepts and moescale refuses, since loaders treat them differently."""


# Headers ------------------------------------------------------------------------------------------


def parse(file: bytes) -> Header:
    """Read the header of a file in memory, as a plan does from disk."""
    length = header_length(file[:8], len(file), NAME)
    return parse_header(file[8 : 8 + length], len(file), NAME)


def with_header(text: str | bytes, body: bytes = b"") -> bytes:
    """A file with this header, valid or not."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data + body


@contextmanager
def one_line(*kinds: type[MoescaleError]) -> Iterator[None]:
    """Allow only moescale's own errors, each with one printable line."""
    try:
        yield
    except kinds as error:
        assert len(error.message.splitlines()) == 1, error.message
        assert len(error.message) < 1000, error.message[:1000]
        error.message.encode(errors="backslashreplace")


def header_holds(file: bytes) -> None:
    """Headers that safetensors rejects are refused, and accepted ones mean the same."""
    try:
        theirs = dict(safetensors.deserialize(file))
    except safetensors.SafetensorError:
        theirs = None
    try:
        ours = parse(file)
    except CheckpointError as error:
        assert error.message.startswith(f"{NAME}: ")
        assert len(error.message.splitlines()) == 1
        assert len(error.message) < 1000
        assert theirs is None or any(why in error.message for why in STRICTER), error.message
        return
    assert theirs is not None, "taken, though safetensors rejects it"
    assert ours.by_name.keys() == theirs.keys()
    for name, tensor in ours.by_name.items():
        assert tensor.dtype == theirs[name]["dtype"]
        assert list(tensor.shape) == theirs[name]["shape"]
        assert file[tensor.start : tensor.stop] == bytes(theirs[name]["data"])


# Other files --------------------------------------------------------------------------------------


def index_holds(data: bytes) -> None:
    """An index is refused, or a mapping from text to text as `json` reads it."""
    with one_line(CheckpointError):
        found = parse_index(data, "model.safetensors.index.json")
        assert found == json.loads(data)["weight_map"]
        assert all(isinstance(shard, str) for shard in found.values())


def spans_hold(data: bytes) -> None:
    """The spans of all values of a JSON text hold the values that `json` reads."""
    try:
        text = data.decode()
        value = parse_lenient(text)
    except ValueError:
        return
    spans = list(value_spans(text, lambda path: True))
    if len(spans) != _count(value):
        return  # of a repeated key, `json` keeps only the last value
    for path, (start, stop) in spans:
        inner = value
        for key in path:
            inner = inner[key]
        assert repr(json.loads(text[start:stop])) == repr(inner)


def _count(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count, inner))


def factors_hold(data: bytes) -> None:
    """A factors file is refused, or gives factors that options accept."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    with one_line(UsageError):
        Options(factors=parse_factors(text, "factors.json"))


def provenance_holds(data: bytes) -> None:
    """A provenance is read or ignored; comparing it never fails."""
    found = provenance.decode(data)
    assert isinstance(found.content, dict)
    provenance.same_job(found, {"files": []})
    provenance.job_difference(found, {"version": "1", "source": {}, "options": {}})


# Whole checkpoints --------------------------------------------------------------------------------


class MemorySource:
    """A checkpoint in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._content = files
        self.received, self.remote, self.parallel_reads = 0, False, 1
        self.remarks: list[str] = []
        self.gguf_set = None
        self.identity = SourceId("source", Path("source"), folder="source")
        self.gguf_set = GgufSet("m", "m", None) if "m.gguf" in files else None

    def files(self) -> Mapping[str, FileInfo]:
        """All files with their sizes."""
        return {name: FileInfo(name, len(data)) for name, data in self._content.items()}

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A part of one file."""
        return self._content[name][start : None if size is None else start + size]

    def open(self, name: str) -> AbstractContextManager[FileReader]:
        """Fail: nothing is streamed."""
        return nullcontext(FileReader(-1, name))

    def last_changed(self) -> int:
        """None: it never changes."""
        return 0

    def fingerprint(self, name: str) -> Any:
        """Its files never change."""
        return None


def small_config(row: Architecture) -> dict[str, Any]:
    """The config of a small model for a row of the table: 2 layers, 4 experts, 2 per token."""
    section = {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        row.total_keys[0]: 4,
        **dict.fromkeys(row.count_keys[:1], 2),
        **({row.scale_key: 2.5} if row.scale_key else {}),
    }
    config: dict[str, Any] = {"model_type": row.model_type}
    inner = config
    for key in row.sections[-1].split(".") if row.sections[-1] else ():
        inner = inner.setdefault(key, {})
    inner.update(section)
    return config


def small_shard(row: Architecture) -> bytes:
    """The shard of this model."""
    template = row.experts[0]
    stack = f"{sorted(row.stacks)[0]}." if row.stacks else ""
    shape = [2, 2] if "{E}" in template else [4, 2, 2]
    size = 2 * 4 * (1 if "{E}" in template else 4)
    names = [
        f"{stack}{template.format(L=layer, E=expert)}.weight"
        for layer in range(2)
        for expert in range(4 * row.moes_per_layer if "{E}" in template else 1)
    ]
    entries = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    return with_header(json.dumps(entries), bytes(size * len(names)))


def small_model(row: Architecture) -> dict[str, bytes]:
    """The files of a small model for a row of the table."""
    return {
        "config.json": json.dumps(small_config(row)).encode(),
        "model.safetensors": small_shard(row),
    }


def plan_holds(files: Mapping[str, bytes], **options: Any) -> bool:
    """A checkpoint is refused, or planned, printed and described; return whether it is planned."""
    with one_line(MoescaleError):
        plan = make_plan(MemorySource(files), Options(**options))
        json.dumps(plan.as_json(), allow_nan=False)
        provenance.job(plan)
        assert terminal.plan_text(plan, verbose=True)
        card.render(plan, files.get("README.md"))
        return True
    return False


def gguf_key(file: bytes, key: str) -> Any:
    """The value of a key of a GGUF file in memory."""
    return parse_gguf(lambda start, size: file[start : start + size], len(file), "m.gguf").get(key)


def gguf_holds(data: bytes) -> None:
    """A GGUF file is refused, or planned with a header that can be read again."""
    for options in ({"experts": 3}, {"factor": 2.0}, {"experts": 1, "fold": "scale"}):
        if not plan_holds({"m.gguf": data}, **options):
            continue
        plan = make_plan(MemorySource({"m.gguf": data}), Options(**options))
        if plan.changes_nothing:
            continue
        new = b"".join(
            data[part.start : part.stop] if part.data is None else part.data
            for part in plan.segments(plan.files[0])
        )
        assert len(new) == plan.output_size(plan.files[0])
        assert gguf_key(new, "moescale.version") == __version__


def small_gguf() -> bytes:
    """A model of one block with two experts, made without a library."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    keys = [text("general.architecture") + struct.pack("<I", 8) + text("hy_v3")]
    for name, value in (("expert_count", 4), ("expert_used_count", 2), ("expert_gating_func", 2)):
        keys.append(text(f"hy_v3.{name}") + struct.pack("<II", 4, value))
    infos, offset = b"", 0
    for name, shape in (("ffn_norm", (2,)), ("ffn_gate_inp", (2, 4)), ("ffn_down_exps", (4, 2, 4))):
        size = 4 * math.prod(shape)
        infos += text(f"blk.0.{name}.weight") + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *shape, 0, offset)
        offset += size + -size % 32
    head = b"GGUF" + struct.pack("<IQQ", 3, 3, len(keys)) + b"".join(keys) + infos
    return head + bytes(-len(head) % 32) + bytes(range(256))[:offset]


def directory_holds(root: Path) -> None:
    """A directory is planned or refused."""
    with one_line(MoescaleError):
        make_plan(LocalSource(root), Options(experts=3))


def card_holds(data: bytes) -> None:
    """Any card gives a card for the output, with moescale's section and the old text."""
    new = card.render(_a_plan(), data)
    assert b"## Rescaled mixture of experts" in new
    new.decode()


@functools.cache
def _a_plan() -> Plan:
    return make_plan(MemorySource(small_model(architectures.ROWS[0])), Options(experts=3))


def journal_holds(data: bytes) -> None:
    """A journal is read or ignored."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(data)
        job = Journal.job_of(path)
        assert job != {"version": "1"}
        with one_line(DestinationError):
            Journal(path, {"version": "1"}).close()
        if job is not None:
            path.write_bytes(b'{"job": 1}\n' + data + b"\n" + data)
            Journal(path, 1).close()
