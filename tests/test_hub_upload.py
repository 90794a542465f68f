"""What an upload to the Hub takes, who decides it, and shards that grow on the way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import checkpoints
import hf_xet
import pytest
import quantised_checkpoints
from hub_checkpoints import PLACE, Lab, laboratory, large_shard

from moescale import convert
from moescale.repos.hub_upload import new_session


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A laboratory without a Hub yet."""
    with laboratory(tmp_path, monkeypatch) as lab:
        yield lab


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
    """Uploads are narrow for the sake of memory, unless HF_XET_* says something else."""
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(hf_xet, "XetSession", lambda config: config)
    theirs = hf_xet.XetConfig()
    if want is None:
        want = (*(theirs.get(key) for key in KEYS[:2]), 1)
        assert min(want[:2]) > 1
    config = new_session()
    assert tuple(config.get(key) for key in KEYS) == want


# Shards that grow ---------------------------------------------------------------------------

WIDENED = next(case for case in quantised_checkpoints.EXACT if "promote" in case.changed.values())


@pytest.mark.parametrize("xet", [True, False])
def test_a_shard_whose_header_changes_is_streamed_too(lab: Lab, xet: bool) -> None:
    """Where a scale is widened to F32, size and digest are those of the new file."""
    hub = lab.start(xet=xet)
    folder = lab.root / "widened"
    quantised_checkpoints.write(WIDENED, folder)
    files = checkpoints.tree(folder)
    hub.add_repo("lab/widened", files)
    convert(folder, lab.root / "out", factor=1.37)
    result = convert("lab/widened", PLACE, factor=1.37, check=True)
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
    """A shard of 150 MB is not in memory: the peak stays far below the contract's limits."""
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
    """The most memory that a process has had so far, in bytes; 0 if it is gone."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) << 10 if found else 0
    return 0
