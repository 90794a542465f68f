"""What an upload to the Hub costs, which settings decide it, and what is not sent."""

from __future__ import annotations

import json
import random
import re
import time
from contextlib import suppress
from pathlib import Path

import hf_xet
import pytest
from support import checkpoints, quantised_checkpoints
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, Lab, large_shard, rescaled
from support.hub_faults import status

from moescale import convert
from moescale.errors import bytes_text
from moescale.storage.hub.upload import new_session

COMMIT = ("POST", r"^api /api/models/me/out/commit/")


KEYS = (
    "client.ac_max_upload_concurrency",
    "client.ac_initial_upload_concurrency",
    "data.session_xorb_metadata_flush_max_count",
)


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("HF_XET_LOG_LEVEL", "info", (1, 1, 1)),
        ("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "7", (7, 1, 1)),
        ("HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY", "2", (1, 2, 1)),
        ("HF_XET_FIXED_UPLOAD_CONCURRENCY", "3", (3, 3, 1)),
        ("HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_MAX_COUNT", "9", (1, 1, 9)),
        ("HF_XET_HIGH_PERFORMANCE", "1", None),
    ],
)
def test_the_users_settings_win_over_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, want: tuple[int, ...] | None
) -> None:
    """Uploads use few connections to save memory, unless HF_XET_* variables say otherwise."""
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(hf_xet, "XetSession", lambda config: config)
    theirs = hf_xet.XetConfig()
    if want is None:
        want = (*(theirs.get(key) for key in KEYS[:2]), 1)
        assert min(want[:2]) > 1
    config = new_session()
    assert tuple(config.get(key) for key in KEYS) == want


# Copies on the Hub --------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["another repo", "a branch of the source's repo"])
def test_unchanged_files_are_copied_on_the_hub(lab: Lab, to: str) -> None:
    """With `--rule none` no byte of a shard is transferred; the Hub copies them."""
    hub = lab.start()
    place = PLACE if to == "another repo" else f"hf://{SRC}@four"
    if to != "another repo":
        hub.tokens[hub.token].namespaces = frozenset({"me", "lab"})
    outcome = lab.done(SRC, place, "-k", "3", "--rule", "none")
    assert hub.traffic("^cdn") == (0, len(SHARDS) * (32 << 10))
    repo, branch = (DST, "main") if to == "another repo" else (SRC, "four")
    output = lab.output(repo, branch)
    assert {name: output[name] for name in SHARDS} == {n: lab.source[n] for n in SHARDS}
    assert json.loads(output["config.json"])["num_experts_per_tok"] == 3
    copied = bytes_text(sum(len(lab.source[name]) for name in SHARDS))
    assert f"{copied} copied there" in outcome.err


def test_some_files_are_copied_and_others_sent(lab: Lab) -> None:
    """Beside shards that change, a large file that stays is copied by the Hub, once."""
    hub = lab.start()
    words = random.Random(0).randbytes(300_000)
    hub.commit(SRC, {"tokenizer.model": words})
    hub.fault(COMMIT, status(403), nth=4)
    assert lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1").code == 3
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert hub.read(DST, "tokenizer.model") == words
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)
    assert not hub.find(f"^cdn /{hub.files(SRC)['tokenizer.model'].sha256}")
    assert len(hub.find(("POST", "lfs-files/duplicate"))) == 1


def test_what_cannot_be_copied_is_sent(lab: Lab) -> None:
    """If the Hub cannot copy between these repos, the bytes are sent without a long wait."""
    hub = lab.start()
    refusal = status(403, {"error": "Cannot copy across storage regions"})
    hub.fault("lfs-files/duplicate", refusal, times=None)
    lab.done(SRC, PLACE, "-k", "3", "--rule", "none", "-q")
    assert {n: hub.read(DST, n) for n in SHARDS} == {n: lab.source[n] for n in SHARDS}
    assert not lab.waits


# Shards that grow ---------------------------------------------------------------------------

WIDENED = next(case for case in quantised_checkpoints.EXACT if "promote" in case.changed.values())


@pytest.mark.parametrize("xet", [True, False])
def test_a_shard_whose_header_changes_is_streamed_too(lab: Lab, xet: bool) -> None:
    """If a scale becomes F32, size and digest are those of the new file."""
    hub = lab.start(xet=xet)
    folder = lab.root / "widened"
    quantised_checkpoints.write(WIDENED, folder)
    files = checkpoints.tree(folder)
    hub.add_repo("lab/widened", files)
    convert(folder, lab.root / "out", factor=1.37)
    result = convert("lab/widened", PLACE, factor=1.37, verify=True)
    want = checkpoints.tree(lab.root / "out")
    shards = [name for name in want if name.endswith(".safetensors")]
    assert result.verified
    assert any(len(want[name]) > len(files[name]) for name in shards)
    assert {n: d for n, d in lab.output().items() if n in shards} == {n: want[n] for n in shards}


# Memory -------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("to", "limit"), [("disk", 120), ("Hub", 330)], ids=["to disk", "to the Hub, all bytes new"]
)
def test_memory_stays_within_limits(lab: Lab, to: str, limit: int) -> None:
    """The peak memory of a run with a shard of 150 MB stays below a fixed limit."""
    hub = lab.start(xet="http")
    folder = lab.root / "large"
    folder.mkdir()
    large_shard(folder / "model.safetensors", 150 * MIB)
    count = (folder / "model.safetensors").stat().st_size // (3 * 8 * MIB)
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 1,
        "num_experts_per_tok": 2,
        "num_local_experts": count,
    }
    (folder / "config.json").write_text(json.dumps(config))
    hub.add_repo("lab/large", {path.name: path for path in folder.iterdir()})
    target = str(lab.root / "out") if to == "disk" else PLACE
    peak = 0
    with lab.start_child("lab/large", target, "-k", "3", "-q") as process:
        while process.poll() is None:
            peak = max(peak, resident_peak(process.pid))
            time.sleep(0.02)
    assert process.returncode == 0
    assert 20 * MIB < peak < limit * MIB


def resident_peak(pid: int) -> int:
    """The peak memory of a process in bytes; 0 if it has ended."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) << 10 if found else 0
    return 0
