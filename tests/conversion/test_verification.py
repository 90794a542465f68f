"""Verification of an output: any byte that is not as planned is found and located."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints, quantised_checkpoints

from moescale.api import convert, verify
from moescale.cli import EXIT_CODES
from moescale.errors import DestinationError, MoescaleError, SourceError, VerificationError
from moescale.version import __version__

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete small Mixtral repo."""
    return checkpoints.mixtral(tmp_path / "source")


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    """The output of that source, from 2 experts to 3."""
    convert(source, tmp_path / "out", experts=3)
    return tmp_path / "out"


def flip(path: Path, offset: int, bit: int = 1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


def difference(source: Path, output: Path, **options: Any) -> str:
    """The one-line error with which a verification fails."""
    with pytest.raises(VerificationError) as caught:
        verify(source, output, **{"experts": 3, **options})
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


# Correct outputs ----------------------------------------------------------------------------------


def test_a_good_output_passes(source: Path, output: Path) -> None:
    """Verification passes, and changes only the digests in the provenance."""
    before = checkpoints.tree(output)
    assert verify(source, output, experts=3).verified
    after = checkpoints.tree(output)
    assert {name for name in after if after[name] != before[name]} == {"moescale.json"}


def test_the_digests_are_filled_in(source: Path, output: Path) -> None:
    """Afterwards every file has its SHA-256, and the rest of the provenance is unchanged."""
    before = json.loads((output / "moescale.json").read_bytes())
    verify(source, output, experts=3)
    after = json.loads((output / "moescale.json").read_bytes())
    tree = checkpoints.tree(output)
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in tree.items() if n != "moescale.json"}
    assert {f["name"]: f["sha256"] for f in after["files"]} == digests
    for content in (before, after):
        for file in content["files"]:
            del file["sha256"]
    assert before == after


def test_a_second_verification_changes_nothing(source: Path, output: Path) -> None:
    """Known digests are compared, and the output stays byte for byte."""
    verify(source, output, experts=3)
    before = checkpoints.tree(output)
    verify(source, output, experts=3, jobs=3)
    assert checkpoints.tree(output) == before


def test_a_verified_run_writes_the_same(source: Path, tmp_path: Path) -> None:
    """Writing and verifying in one run gives the same bytes as in two."""
    convert(source, tmp_path / "one", experts=3, verify=True)
    convert(source, tmp_path / "two", experts=3)
    verify(source, tmp_path / "two", experts=3)
    assert checkpoints.tree(tmp_path / "one") == checkpoints.tree(tmp_path / "two")


def test_an_output_that_is_not_rescaled_passes(source: Path, tmp_path: Path) -> None:
    """An output of the rule none is verified like any other."""
    assert convert(source, tmp_path / "out", experts=3, rule="none", verify=True).verified


def test_a_stale_output_that_is_still_right_passes(source: Path, output: Path) -> None:
    """Times of the source do not matter, and after verification the output is finished again."""
    later = (output / "moescale.json").stat().st_mtime + 5
    os.utime(source / SHARD, (later, later))
    assert convert(source, output, experts=3, verify=True).status in ("stale", "done")


def test_git_and_cache_of_the_output_do_not_matter(source: Path, output: Path) -> None:
    """A cloned destination is verified without the folders of git and the Hub's client."""
    checkpoints.write_files(output, checkpoints.NO_CHECKPOINT)
    assert verify(source, output, experts=3).verified


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, mtime and ctime of every file: what rewriting would change."""
    return {
        str(path.relative_to(folder)): (info.st_ino, info.st_mtime_ns, info.st_ctime_ns)
        for path in folder.rglob("*")
        if (info := path.stat())
    }


def test_the_same_command_again_rewrites_nothing(source: Path, output: Path) -> None:
    """The first run only adds the digests, the second writes nothing; both read everything."""
    seen: dict[str, int] = {}

    def count(name: str, size: int) -> None:
        seen[name] = seen.get(name, 0) + size

    before = stamps(output)
    result = convert(source, output, experts=3, verify=True, progress=count)
    assert (result.status, result.verified) == ("done", True)
    first = stamps(output)
    assert {n for n in first if first[n] != before[n]} <= {"moescale.json", "."}
    assert seen == {f.name: result.plan.output_size(f) for f in result.plan.large_files if f.size}
    for _ in range(2):
        assert convert(source, output, experts=3, verify=True).status == "done"
        assert stamps(output) == first


def test_an_output_in_the_cache_of_the_hub_passes(source: Path, output: Path) -> None:
    """In the Hub cache an output consists of links to blobs; it is verified there."""
    verify(source, output, experts=3)  # an output on the Hub has its digests
    snapshot = output.parent / "models--me--out" / "snapshots" / ("c" * 40)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(output.rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(output)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(path.read_bytes())
        link.symlink_to(blobs / str(number))
    assert verify(source, snapshot, experts=3).verified
    assert all(path.is_symlink() for path in snapshot.iterdir() if not path.is_dir())
    flip(snapshot / SHARD, 2000)
    assert "byte 2000" in difference(source, snapshot)


# Wrong outputs ------------------------------------------------------------------------------------


def tensor_at(path: Path, offset: int) -> str:
    """The tensor that a byte of a shard belongs to; "header" for the bytes before the tensors."""
    for name, (_, start, stop) in checkpoints.spans(path.read_bytes()).items():
        if start <= offset < stop:
            return name
    return "header"


def fails_with_four(source: Path, output: Path, **options: Any) -> str:
    """The line of the same command with --verify, which exits with 4 and changes nothing."""
    before = checkpoints.tree(output)
    with pytest.raises(VerificationError) as caught:
        convert(source, output, verify=True, **{"experts": 3, **options})
    assert next(code for kind, code in EXIT_CODES.items() if isinstance(caught.value, kind)) == 4
    assert checkpoints.tree(output) == before
    return caught.value.message


@pytest.mark.parametrize("seed", range(3))
def test_any_byte_of_any_file(source: Path, output: Path, seed: int) -> None:
    """Any flipped bit: exit 4, with file, tensor and first offset; nothing is repaired."""
    rng = random.Random(seed)
    verify(source, output, experts=3)
    names = [name for name, data in checkpoints.tree(output).items() if data]
    for name in [*names, *[SHARD] * 12]:
        path = output / name
        data = path.read_bytes()
        offset = rng.randrange(len(data))
        flip(path, offset, 1 << rng.randrange(8))
        message = fails_with_four(source, output)
        if name == "moescale.json" and "its SHA-256 is not the one recorded" in message:
            message = f"{name}: at byte {offset}"  # it names the file whose digest was changed
        assert message.startswith(f"{name}: "), message
        assert re.search(rf"at byte {offset}\b", message), message
        path.write_bytes(data)
        if name.endswith(".safetensors"):
            assert tensor_at(path, offset) in message
    assert convert(source, output, experts=3, verify=True).verified


def test_a_bit_of_the_provenance(source: Path, output: Path) -> None:
    """A changed digest is reported as such; for other changes, the first wrong byte is named."""
    path = output / "moescale.json"
    verify(source, output, experts=3)
    data = path.read_bytes()
    for offset in (0, data.index(b"preserve"), data.index(b'"factors"') + 14, len(data) - 1):
        flip(path, offset)
        message = fails_with_four(source, output)
        assert message == f"moescale.json: differs from the plan at byte {offset}"
        path.write_bytes(data)
    flip(path, data.index(b'"sha256": "') + 12)
    assert "SHA-256" in fails_with_four(source, output)


@pytest.mark.parametrize("where", ["first", "last", "neighbour", "header"])
def test_a_byte_of_a_promoted_scale(tmp_path: Path, where: str) -> None:
    """In a shard with a new header, offsets and names are those of the output."""
    case = next(c for c in quantised_checkpoints.EXACT if c.id == "block FP8, BF16 scales")
    source, output = tmp_path / "source", tmp_path / "out"
    quantised_checkpoints.write(case, source)
    convert(source, output, factor=1.5, verify=True)
    path = output / SHARD
    start, stop = next(
        place
        for name, (dtype, *place) in checkpoints.spans(path.read_bytes()).items()
        if dtype == "F32" and name.endswith("down_proj.weight_scale_inv")
    )
    offset = {"first": start, "last": stop - 1, "neighbour": start - 1, "header": 40}[where]
    wanted = tensor_at(path, offset)
    flip(path, offset)
    message = fails_with_four(source, output, experts=None, factor=1.5)
    assert message.startswith(f"{path.name}: differs from the plan at byte {offset}, in ")
    assert (repr(wanted) if where != "header" else "the header") in message


@pytest.mark.parametrize("name", ["moescale.json", "config.json", "README.md", SHARD, "LICENSE"])
def test_a_missing_file_of_an_earlier_output(source: Path, output: Path, name: str) -> None:
    """The same command with --verify reports what is missing, even the provenance."""
    (output / name).unlink()
    if name == "moescale.json":
        assert fails_with_four(source, output) == f"{name}: is missing from the output"
    else:
        assert f"{name}: is missing" in fails_with_four(source, output)


def test_an_output_of_another_version(source: Path, output: Path) -> None:
    """The error names both versions, since neither is wrong."""
    path = output / "moescale.json"
    path.write_bytes(path.read_bytes().replace(__version__.encode(), b"99.1"))
    (output / "README.md").write_bytes(b"Made by another version.")
    with pytest.raises(DestinationError, match=f"moescale 99.1; this is {__version__}"):
        convert(source, output, experts=3, verify=True)


def test_an_output_of_links_out_of_it(source: Path, output: Path) -> None:
    """A linked file outside the output does not count, even if its bytes are right."""
    farm = output.parent / "farm"
    farm.mkdir()
    for path in output.iterdir():
        (farm / path.name).symlink_to(path)
    assert "link out of the directory" in difference(source, farm)


def test_a_pipe_in_the_output(source: Path, output: Path) -> None:
    """A pipe does not block the verification, whatever its name is."""
    for name in ("README.md", "moescale.json", SHARD):
        (output / name).rename(output.parent / "aside")
        os.mkfifo(output / name)
        with pytest.raises(MoescaleError):
            convert(source, output, experts=3, verify=True)
        (output.parent / "aside").rename(output / name)
    assert verify(source, output, experts=3).verified


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_byte_of_a_planned_tensor(source: Path, output: Path, where: str) -> None:
    """The error names file, tensor and offset."""
    spans = checkpoints.spans((output / SHARD).read_bytes())
    name = checkpoints.routed(spans)[1]
    _, start, stop = spans[name]
    offset = {"first": start, "middle": (start + stop) // 2, "last": stop - 1}[where]
    flip(output / SHARD, offset)
    message = difference(source, output)
    assert message.startswith(SHARD)
    assert repr(name) in message
    assert f"byte {offset}" in message


@pytest.mark.parametrize("special", [0, 2, 5, 7, 9, 13])
def test_a_bit_of_zero_infinity_or_nan(source: Path, output: Path, special: int) -> None:
    """Values that scaling does not change are compared bit for bit too."""
    spans = checkpoints.spans((output / SHARD).read_bytes())
    name = checkpoints.routed(spans)[0]
    flip(output / SHARD, spans[name][1] + special)
    assert repr(name) in difference(source, output)


def test_a_byte_of_another_tensor(source: Path, output: Path) -> None:
    """A copied tensor is compared too."""
    spans = checkpoints.spans((output / SHARD).read_bytes())
    other = next(name for name in spans if name not in checkpoints.routed(spans))
    flip(output / SHARD, spans[other][1] + 3)
    message = difference(source, output)
    assert f"byte {spans[other][1] + 3}" in message
    assert message.startswith(SHARD)


def test_a_weight_that_was_not_scaled(source: Path, output: Path) -> None:
    """An unscaled weight is found."""
    (output / SHARD).write_bytes((source / SHARD).read_bytes())
    assert "in tensor" in difference(source, output)


@pytest.mark.parametrize("offset", [0, 8, 30])
def test_a_byte_of_the_header(source: Path, output: Path, offset: int) -> None:
    """A damaged length or name is a difference, not a crash of the reader."""
    flip(output / SHARD, offset)
    assert f"byte {offset}" in difference(source, output)


@pytest.mark.parametrize("change", [lambda d: d + b"\0", lambda d: d[:-1], lambda d: b""])
def test_a_shard_of_another_size(
    source: Path, output: Path, change: Callable[[bytes], bytes]
) -> None:
    """A shard that is too long, too short or empty: the error gives both sizes."""
    data = (output / SHARD).read_bytes()
    (output / SHARD).write_bytes(change(data))
    message = difference(source, output)
    assert SHARD in message
    assert str(len(data)) in message


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "README.md", "tokenizer.json", "LICENSE"],
)
def test_a_byte_of_a_small_file(source: Path, output: Path, name: str) -> None:
    """Config, index, card and every copied file are compared byte for byte."""
    flip(output / name, 3)
    message = difference(source, output)
    assert message.startswith(name)
    assert "byte 3" in message


def test_a_config_with_another_number(source: Path, output: Path) -> None:
    """The experts per token are verified too."""
    path = output / "config.json"
    path.write_bytes(path.read_bytes().replace(b"\t3 ,", b"\t2 ,"))
    assert difference(source, output).startswith("config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", SHARD, "moescale.json", "empty.txt"])
def test_a_missing_file(source: Path, output: Path, name: str) -> None:
    """The error names a file that the source has and the output lacks."""
    (output / name).unlink()
    assert difference(source, output) == f"{name}: is missing from the output"


@pytest.mark.parametrize("name", ["consolidated.safetensors", "pytorch_model.bin", "extra/x", "y"])
def test_a_surplus_file(source: Path, output: Path, name: str) -> None:
    """A twin that was added to the output is found, and so is any other file."""
    checkpoints.write_files(output, {name: b"x"})
    assert difference(source, output).startswith(f"{name}: ")


@pytest.mark.parametrize(
    "options", [{"experts": 4}, {"rule": "none"}, {"rule": "published"}, {"factor": 1.2}]
)
def test_another_job(source: Path, output: Path, options: dict[str, Any]) -> None:
    """The output was not made with these options."""
    assert difference(source, output, **options)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b"\xff"])
def test_a_broken_provenance(source: Path, output: Path, content: bytes) -> None:
    """A provenance with other content is a difference."""
    (output / "moescale.json").write_bytes(content)
    assert difference(source, output).startswith("moescale.json")


def test_a_provenance_that_is_nested_without_end(source: Path, output: Path) -> None:
    """A hostile provenance is a difference, not a crash."""
    (output / "moescale.json").write_bytes(b"[" * 100_000)
    assert difference(source, output).startswith("moescale.json")


def test_a_wrong_digest_in_the_provenance(source: Path, output: Path) -> None:
    """Recorded digests are compared with those of the files."""
    verify(source, output, experts=3)
    path = output / "moescale.json"
    content = json.loads(path.read_bytes())
    content["files"][3]["sha256"] = "0" * 64
    path.write_text(json.dumps(content, indent=2))
    assert difference(source, output).startswith(content["files"][3]["name"])


def test_a_source_that_was_changed_since(source: Path, output: Path) -> None:
    """An output verified against a changed source is wrong."""
    spans = checkpoints.spans((source / SHARD).read_bytes())
    _, start, _ = spans[checkpoints.routed(spans)[0]]
    flip(source / SHARD, start + 41)
    assert "in tensor" in difference(source, output)


def test_a_failed_verification_changes_nothing(source: Path, output: Path) -> None:
    """A failed verification records no digest."""
    flip(output / SHARD, 2000)
    before = checkpoints.tree(output)
    difference(source, output)
    assert checkpoints.tree(output) == before


@pytest.mark.parametrize("what", ["nothing", "a run"])
def test_an_output_that_is_not_finished(source: Path, tmp_path: Path, what: str) -> None:
    """A missing or unfinished output cannot be verified."""
    if what == "a run":
        checkpoints.write_files(tmp_path / "out", {".moescale/journal.jsonl": b'{"job": 1}\n'})
    with pytest.raises(SourceError):
        verify(source, tmp_path / "out", experts=3)


def test_a_link_in_the_output(source: Path, output: Path) -> None:
    """A link to the right bytes is not a file of the output."""
    (output / "LICENSE").unlink()
    (output / "LICENSE").symlink_to(source / "LICENSE")
    with pytest.raises(MoescaleError, match="LICENSE"):
        verify(source, output, experts=3)


def test_the_first_difference_of_a_large_file_is_found(tmp_path: Path) -> None:
    """Offsets beyond the first piece are right too."""
    tensors = checkpoints.fused_mixtral_tensors(layers=1)
    tensors["big"] = ("U8", (3 << 20,), bytes(3 << 20))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = checkpoints.values("BF16", (4, 301, 997), special=False)
    wide = checkpoints.values("BF16", (4, 2 * 997, 301), special=False)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = wide
    source = tmp_path / "source"
    checkpoints.write_shards(source, tensors, 1)
    config = {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 4}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", experts=3)
    shard = tmp_path / "out" / "model.safetensors"
    spans = checkpoints.spans(shard.read_bytes())
    for tensor in ("big", name):
        offset = spans[tensor][2] - 5
        flip(shard, offset)
        assert f"byte {offset}" in difference(source, tmp_path / "out")
        flip(shard, offset)
