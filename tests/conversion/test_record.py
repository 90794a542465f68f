"""What a finished output says about itself: what was done, and whether its files are unchanged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import checkpoints
from support.gguf_models import write_model

import moescale
from moescale.conversion import recorded_output
from moescale.report.terminal import record_text


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished output of a small Mixtral, with all digests recorded."""
    source = checkpoints.mixtral(tmp_path / "source")
    moescale.convert(source, tmp_path / "out", experts=3, trained_experts=2, verify=True)
    return tmp_path / "out"


def found(out: Path, check: bool = False) -> moescale.Record:
    """The record of a folder that has one."""
    record = moescale.record(out, verify=check)
    assert record is not None
    return record


def test_an_output_says_what_was_done(out: Path) -> None:
    """The record gives source, options, rule, factors and counts, and that no file has changed."""
    record = found(out)
    assert record.differences == {}
    assert record.read == len(checkpoints.tree(out)) - 1 and record.sized == 0
    text = record_text(record)
    for words in (
        f"output             {out}",
        "from               source",
        "options            experts=3, trained_experts=2",
        "rule               preserve, factor 1.22474 in 2 layers",
        "experts per token  2 -> 3",
        f"unchanged since they were written; {record.read} compared by SHA-256, 0 by",
        f"moescale SRC {out} --verify",
    ):
        assert words in text
    data = json.loads(json.dumps(record.as_json()))
    assert data["record"]["factors"] == json.loads((out / "moescale.json").read_bytes())["factors"]
    assert data["files"] == {"differ": {}, "read": record.read, "sized": 0}


def test_every_change_is_named(out: Path) -> None:
    """A file that is missing, longer, changed or new is named."""
    (out / "LICENSE").unlink()
    shard = out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with open(out / "tokenizer.json", "ab") as file:
        file.write(b" ")
    (out / "notes.txt").write_bytes(b"mine")
    size = os.path.getsize(out / "tokenizer.json")
    assert found(out).differences == {
        "LICENSE": "is missing",
        shard.name: "has changed since it was written",
        "tokenizer.json": f"has {size} bytes instead of {size - 1}",
        "notes.txt": "was not written by that run",
    }
    assert "4 changed since they were written" in record_text(found(out))


def test_large_files_are_read_when_asked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `check` only their sizes are compared, and the text says so."""
    monkeypatch.setattr(recorded_output, "SMALL_BYTES", 100)
    shard = out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    quick = found(out)
    assert quick.differences == {} and quick.sized >= 3
    assert f"{quick.sized} by size only" in record_text(quick)
    assert found(out, check=True).differences == {shard.name: "has changed since it was written"}


def test_a_gguf_file_says_it_in_its_header(tmp_path: Path) -> None:
    """A GGUF file cannot contain its own digest, and may be among other files."""
    (source,) = write_model(tmp_path / "m.gguf")
    moescale.convert(source, tmp_path / "out.gguf", experts=3, rule="preserve")
    record = found(tmp_path / "out.gguf")
    assert record.differences == {}
    assert "experts per token  2 -> 3" in record_text(record)
    assert "no sizes or digests recorded" in record_text(record)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"a": 1}'])
def test_another_place_has_no_record(content: bytes | None, tmp_path: Path) -> None:
    """The folder is a model, or has another program's file of that name."""
    source = checkpoints.mixtral(tmp_path / "source")
    if content is not None:
        (source / "moescale.json").write_bytes(content)
    assert moescale.record(source) is None


@pytest.mark.parametrize("key", ["files", "factors", "source", "experts", "options", "rule"])
@pytest.mark.parametrize("value", [None, 1, "x\x1b[2J", [1], {"name": 1}, [{"name": "a"}]])
def test_nonsense_in_a_record_is_shown_as_it_is(key: str, value: object, out: Path) -> None:
    """The record may come from anyone: no error, and no control characters on the terminal."""
    path = out / "moescale.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), key: value}))
    assert "\x1b" not in record_text(found(out))
