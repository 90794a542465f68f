"""The storage for xet uploads: reads the files of `hf_xet`, and speaks its HTTP protocol.

`hf_xet` writes *xorbs* (chunks, compressed, one after another) and *shards* (which chunks of which
xorbs make a file, and the file's SHA-256). A `local://` folder and the HTTP service here hold the
same two kinds of files, so one reader serves both.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.hub_faults import Response, json_response
from support.hub_store import HubError

ENTRY = 48
END = b"\xff" * 32
VERIFIED, EXTENDED, ELIGIBLE = 1 << 31, 1 << 30, 1 << 31
LZ4_MAGIC = b"\x04\x22\x4d\x18"


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` of a xorb, a stretch of a file."""

    xorb: str
    start: int
    end: int


@dataclass(frozen=True)
class XetFile:
    """A file as a shard describes it."""

    hash: str
    size: int
    sha256: str
    terms: tuple[Term, ...]


def hexed(raw: bytes) -> str:
    """Write a hash as xet does: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class Shard:
    """One shard: its files, and the chunks that later uploads can reuse."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.files: list[XetFile] = []
        self.chunks: set[str] = set()
        self.xorbs_at = self._read_files(ENTRY)
        self.end = self._read_xorbs(self.xorbs_at)

    def _read_files(self, at: int) -> int:
        while (head := self._data[at : at + ENTRY])[:32] != END:
            flags, count = struct.unpack_from("<II", head, 32)
            at += ENTRY
            terms, size = [], 0
            for number in range(count):
                entry = self._data[at + number * ENTRY : at + (number + 1) * ENTRY]
                _, length, start, end = struct.unpack_from("<4I", entry, 32)
                terms.append(Term(hexed(entry[:32]), start, end))
                size += length
            at += ENTRY * count * (2 if flags & VERIFIED else 1)
            sha256 = ""
            if flags & EXTENDED:
                sha256 = hexed(self._data[at : at + 32])
                at += ENTRY
            self.files.append(XetFile(hexed(head[:32]), size, sha256, tuple(terms)))
        return at + ENTRY

    def _read_xorbs(self, at: int) -> int:
        while (head := self._data[at : at + ENTRY])[:32] != END:
            (count,) = struct.unpack_from("<I", head, 36)
            for number in range(1, count + 1):
                entry = self._data[at + number * ENTRY : at + (number + 1) * ENTRY]
                if number == 1 or struct.unpack_from("<I", entry, 40)[0] & ELIGIBLE:
                    self.chunks.add(hexed(entry[:32]))
            at += ENTRY * (count + 1)
        return at + ENTRY

    def as_answer(self) -> bytes:
        """Write the shard as the answer to a deduplication query: with a footer, without key."""
        lookups = (self.end, 0) * 3
        footer = struct.pack("<9Q", 1, ENTRY, self.xorbs_at, *lookups) + bytes(32)
        footer += struct.pack("<2Q", 0, 2**64 - 1) + bytes(72) + struct.pack("<Q", self.end)
        head = self._data[:40] + struct.pack("<Q", len(footer))
        return head + self._data[ENTRY : self.end] + footer


def lz4_block(block: bytes, out: bytearray) -> None:
    """Append the content of a compressed LZ4 block."""
    at, size = 0, len(block)
    while at < size:
        token = block[at]
        at += 1
        literals, at = _lz4_length(block, at, token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= size:
            return
        distance = block[at] | block[at + 1] << 8
        match, at = _lz4_length(block, at + 2, token & 15)
        match += 4
        start = len(out) - distance
        if distance >= match:
            out += out[start : start + match]
        else:
            pattern = bytes(out[start:])
            out += (pattern * (match // distance + 1))[:match]


def _lz4_length(block: bytes, at: int, length: int) -> tuple[int, int]:
    if length == 15:
        while True:
            length += block[at]
            at += 1
            if block[at - 1] != 255:
                break
    return length, at


def lz4_frame(frame: bytes) -> bytes:
    """Decompress one LZ4 frame."""
    if frame[:4] != LZ4_MAGIC:
        raise ValueError("not an LZ4 frame")
    flags = frame[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        length = size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + length]
        if size >> 31:
            out += block
        else:
            lz4_block(block, out)
        at += 4 + length + (4 if flags & 16 else 0)
    return bytes(out)


def ungrouped(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte."""
    out = bytearray(len(data))
    at = 0
    for group in range(4):
        length = len(range(group, len(data), 4))
        out[group::4] = data[at : at + length]
        at += length
    return bytes(out)


def chunks_of(path: Path, start: int, end: int) -> Iterator[bytes]:
    """Read the chunks `start` to `end` of a xorb."""
    with path.open("rb") as file:
        for number in range(end):
            head = file.read(8)
            length = int.from_bytes(head[1:4], "little")
            if number < start:
                file.seek(length, 1)
                continue
            data = file.read(length)
            if scheme := head[4]:
                data = lz4_frame(data)
            yield ungrouped(data) if scheme == 2 else data


class Cas:
    """The folder of a content-addressed store, written by `hf_xet` or over HTTP."""

    def __init__(self, root: Path, over_http: bool) -> None:
        self.root = root
        inside = root if over_http else root / "xet" / "xorbs"
        self._xorbs, self._shards = inside / "xorbs", inside / "shards"
        self._lock = threading.Lock()
        self._read: set[str] = set()
        self._files: dict[str, XetFile] = {}
        self._chunks: dict[str, Shard] = {}
        root.mkdir(parents=True, exist_ok=True)
        if over_http:
            self._xorbs.mkdir()
            self._shards.mkdir()

    def file(self, sha256: str) -> XetFile | None:
        """Find the file with this SHA-256 among the finished uploads."""
        with self._lock:
            self._refresh()
            return self._files.get(sha256)

    def _refresh(self) -> None:
        for path in sorted(self._shards.glob("*.mdb")):
            if path.name not in self._read:
                with suppress(struct.error):  # still being written: read it next time
                    self._learn(Shard(path.read_bytes()))
                    self._read.add(path.name)

    def _learn(self, shard: Shard) -> None:
        self._files.update({file.sha256: file for file in shard.files if file.sha256})
        self._chunks.update(dict.fromkeys(shard.chunks, shard))

    def restore(self, sha256: str, target: Path) -> bool:
        """Write the content of an uploaded file to a plain file."""
        if (file := self.file(sha256)) is None:
            return False
        with target.open("wb") as out:
            for term in file.terms:
                out.writelines(chunks_of(self._xorb(term.xorb), term.start, term.end))
        return True

    def _xorb(self, name: str) -> Path:
        return self._xorbs / f"default.{name}"

    def add_xorb(self, name: str, path: Path) -> Response:
        """Store an uploaded xorb."""
        target = self._xorb(name)
        known = target.exists()
        path.replace(target)
        return json_response({"was_inserted": not known})

    def add_shard(self, data: bytes) -> Response:
        """Store an uploaded shard; every xorb that it refers to must exist."""
        shard = Shard(data)
        for term in (term for file in shard.files for term in file.terms):
            if not self._xorb(term.xorb).exists():
                raise HubError(400, f"shard refers to an unknown xorb {term.xorb}")
        with self._lock:
            name = f"{len(self._read):06}.mdb"
            (self._shards / name).write_bytes(data)
            self._read.add(name)
            self._learn(shard)
        return json_response({"result": 1})

    def query(self, chunk: str) -> Response:
        """Answer which earlier upload contains a chunk."""
        with self._lock:
            if (shard := self._chunks.get(chunk)) is None:
                raise HubError(404, "chunk not found")
            return Response(200, {"Content-Type": "application/octet-stream"}, shard.as_answer())
