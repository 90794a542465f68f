"""The loopback Hub against the real client and `hf_xet`: uploads, copies and faults."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hf_xet
import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    HfApi,
    constants,
    get_session,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import http_backoff
from huggingface_hub.utils._xet import xet_headers_without_auth
from support.hub_client import DST, FILES, SRC, WEIGHTS, Start, hubs, read_range
from support.hub_faults import (
    Action,
    applied,
    corrupt,
    html,
    ignore_range,
    lost,
    reset,
    reset_upload,
    run,
    stall,
    status,
    throttle,
    truncate,
)
from support.hub_server import Hub

OLD_STYLE = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a Hub with a source repo and an empty destination, and a client for it."""
    with hubs(tmp_path, monkeypatch) as starter:
        yield starter


def add(path: str, content: bytes) -> CommitOperationAdd:
    """Make an operation that adds a file."""
    return CommitOperationAdd(path, content)


def failing(hub: Hub, path: str, seconds: float) -> tuple[type[Exception], int]:
    """Read a file whose transfer breaks; return the error, and the number of bytes before it."""
    got = 0
    headers = {"Authorization": f"Bearer {hub.token}"}
    url = hf_hub_url(SRC, path, endpoint=hub.endpoint)
    with pytest.raises(httpx2.TransportError) as caught:  # noqa: SIM117
        with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
            for piece in response.iter_raw():
                got += len(piece)
    return caught.type, got


# Uploads


def test_files_are_copied_between_repos_without_their_bytes(start: Start) -> None:
    """An LFS file goes server-side from a commit of another repo, a small one by the client."""
    hub, api = start()
    sha = hub.branches(SRC)["main"]
    copies = [
        CommitOperationCopy(name, name, src_repo_id=SRC, src_repo_type="model", src_revision=sha)
        for name in ("model.safetensors", "config.json")
    ]
    api.create_commit(DST, copies, commit_message="copy")
    assert hub.read(DST, "model.safetensors") == WEIGHTS
    assert hub.read(DST, "config.json") == FILES["config.json"]
    assert not hub.find("^cdn")
    assert sum(hub.traffic()) < 10_000
    within = CommitOperationCopy("model.safetensors", "again.safetensors")
    api.create_commit(DST, [within], commit_message="copy")
    assert hub.files(DST)["again.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_without_xet_files_are_not_copied_between_repos(start: Start) -> None:
    """The client refuses to copy a file without a xet hash."""
    _, api = start(xet=False)
    copy = CommitOperationCopy(
        "model.safetensors", "model.safetensors", src_repo_id=SRC, src_repo_type="model"
    )
    with pytest.raises(ValueError, match="no xet hash"):
        api.create_commit(DST, [copy], commit_message="copy")


@OLD_STYLE
@pytest.mark.parametrize(("part_size", "puts"), [(8 << 20, 1), (1 << 20, 3)])
def test_lfs_uploads_go_to_the_cdn_in_one_or_many_parts(
    start: Start, monkeypatch: pytest.MonkeyPatch, part_size: int, puts: int
) -> None:
    """Without xet the client puts a file or its parts on the CDN and the Hub verifies it."""
    hub, api = start(xet=False, part_size=part_size)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    operations = [add("w.safetensors", WEIGHTS), add("small.txt", b"1")]
    api.create_commit(DST, operations, commit_message="up")
    assert hub.read(DST, "w.safetensors") == WEIGHTS
    assert len(hub.find(("PUT", "^cdn"))) == puts
    assert hub.traffic("^cdn")[0] == len(WEIGHTS)
    assert len(hub.find("/lfs/verify")) == 1
    assert len(hub.find("complete-multipart")) == (puts > 1)
    assert not hub.leaks()
    hub.log.clear()
    operations = [add("w2.safetensors", WEIGHTS)]
    api.create_commit(DST, operations, commit_message="again")
    assert not hub.find("^cdn")


def test_a_file_that_did_not_arrive_cannot_be_committed(start: Start) -> None:
    """The Hub refuses a commit that refers to contents it does not have."""
    hub, api = start(xet=False)
    operation = uploaded("w.safetensors", 3, hashlib.sha256(b"abc").digest())
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.create_commit(DST, [operation], commit_message="x")
    repo = hub.repo(DST)
    upload = hub.uploads.open(repo, hashlib.sha256(b"abc").hexdigest(), 3, "basic")
    assert get_session().put(upload["href"], content=b"abd").status_code == 400
    assert not repo.objects
    assert get_session().put(upload["href"], content=b"abc").status_code == 200
    api.create_commit(DST, [operation], commit_message="x")
    assert hub.read(DST, "w.safetensors") == b"abc"


def uploaded(path: str, size: int, sha256: bytes) -> CommitOperationAdd:
    """Make an operation for contents that a stream has uploaded."""
    operation = CommitOperationAdd(path, b"")
    operation.upload_info = UploadInfo(size=size, sample=b"", sha256=sha256)
    operation._upload_mode = "lfs"
    operation._is_uploaded = True
    return operation


def streamed(hub: Hub, api: HfApi, repo: str, content: bytes, **config: object) -> tuple:
    """Upload a stream by xet and return the file's description and the whole report."""
    headers = api._build_hf_headers()
    session = hf_xet.XetSession(
        hf_xet.XetConfig().with_config(config or {"client.retry_base_delay": "50ms"})
    )
    commit = session.new_upload_commit(
        token_refresh_url=f"{hub.endpoint}/api/models/{repo}/xet-write-token/main",
        token_refresh_headers=headers,
        custom_headers=xet_headers_without_auth(headers),
    )
    try:
        stream = commit.start_upload_stream(name="shard")
        for at in range(0, len(content), 1 << 20):
            stream.write(content[at : at + (1 << 20)])
        done = stream.finish()
        return done.xet_info, commit.wait_to_finish()
    except BaseException:
        commit.abort()
        raise


CONTENTS = {
    "random": WEIGHTS,
    "zeros": bytes(1 << 20),
    "bfloat16": b"".join(bytes([x, 0x3C + x % 3]) for x in random.Random(2).randbytes(1 << 19)),
    "text": b"".join(b"line %d of %d\n" % (n % 97, n) for n in range(40_000)),
    "one": b"x",
}


@pytest.mark.parametrize("xet", [True, "http"])
def test_xet_uploads_are_served_as_plain_files(start: Start, xet: bool | str) -> None:
    """What `hf_xet` chunked and compressed comes back byte for byte, with its real xet hash."""
    hub, api = start(xet=xet)
    operations = [add(f"{name}.safetensors", data) for name, data in CONTENTS.items()]
    api.create_commit(DST, operations, commit_message="up")
    for name, data in CONTENTS.items():
        assert hub.read(DST, f"{name}.safetensors") == data
    assert not hub.find("^cdn")
    assert bool(hub.traffic("^cas")[0]) == (xet == "http")


@pytest.mark.parametrize("xet", [True, "http"])
def test_a_stream_is_deduplicated_and_committed_by_its_digest(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xet: bool | str
) -> None:
    """A stream upload yields hash, size and SHA-256; the second one sends only what is new."""
    hub, api = start(xet=xet)
    info, report = streamed(hub, api, DST, WEIGHTS)
    assert (info.file_size, info.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert report.dedup_metrics.new_bytes == len(WEIGHTS)
    operation = uploaded("w.safetensors", info.file_size, bytes.fromhex(info.sha256))
    api.create_commit(DST, [operation], commit_message="up")
    assert hub.read(DST, "w.safetensors") == WEIGHTS
    assert api.get_paths_info(DST, ["w.safetensors"])[0].xet_hash == info.hash
    assert not hub.leaks()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another machine"))
    hub.log.clear()
    changed = WEIGHTS[: 2 << 20] + bytes(1000) + WEIGHTS[(2 << 20) + 1000 :]
    info, report = streamed(hub, api, DST, changed)
    assert report.dedup_metrics.new_bytes < 400_000
    if xet == "http":
        assert 0 < hub.traffic("^cas")[0] < 400_000


def test_a_hub_without_xet_says_so(start: Start) -> None:
    """Without xet the Hub gives no write token, and the LFS batch chooses another transfer."""
    hub, api = start(xet=False)
    with pytest.raises(ConnectionError, match="404"):
        streamed(hub, api, DST, b"1")
    assert api.get_paths_info(SRC, ["model.safetensors"])[0].xet_hash is None
    assert chosen_transfer(hub) == "multipart"


def chosen_transfer(hub: Hub) -> str | None:
    """Ask the LFS batch endpoint which transfer it would choose."""
    info = UploadInfo.from_bytes(b"not yet there")
    _, errors, transfer = post_lfs_batch_info(
        [info],
        hub.token,
        "model",
        DST,
        endpoint=hub.endpoint,
        transfers=["basic", "multipart", "xet"],
    )
    assert not errors
    return transfer


def test_a_hub_with_xet_chooses_it_and_guards_its_token(start: Start) -> None:
    """The LFS batch chooses xet, and only users who may write get a write token."""
    hub, _ = start()
    assert chosen_transfer(hub) == "xet"
    for token, code in ((hub.token, 200), (hub.read_token, 403)):
        url = f"{hub.endpoint}/api/models/{DST}/xet-write-token/main"
        answer = get_session().get(url, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == code
    assert answer.headers.get("X-Xet-Cas-Url") is None


# Faults


def test_a_status_is_answered_so_often_and_then_no_more(start: Start) -> None:
    """The second and third request get 429 with `Retry-After`; the client waits and continues."""
    hub, _ = start()
    fault = hub.fault("/refs$", status(429, Retry_After=0), nth=2, times=2)
    url = f"{hub.endpoint}/api/models/{SRC}/refs"
    codes = [get_session().get(url).status_code for _ in range(4)]
    assert codes == [200, 429, 429, 200]
    assert (fault.seen, fault.fired) == (4, 2)
    hub.log.clear()
    hub.fault("/refs$", status(500))
    hub.fault("/refs$", status(503))
    assert [get_session().get(url).status_code for _ in range(3)] == [500, 503, 200]
    hub.log.clear()
    hub.fault("/refs$", status(503, "<html>busy</html>", Content_Type="text/html"))
    assert http_backoff("GET", url, base_wait_time=0.01).status_code == 200
    assert [item.status for item in hub.requests] == [503, 200]


@pytest.mark.parametrize(
    ("action", "error", "got"),
    [
        (reset(), httpx2.ReadError, 0),
        (reset(100_000), httpx2.ReadError, None),
        (truncate(100_000), httpx2.RemoteProtocolError, 100_000),
        (stall(), httpx2.ReadTimeout, 0),
        (stall(100_000), httpx2.ReadTimeout, 100_000),
    ],
)
def test_a_download_breaks_off(
    start: Start, action: Action, error: type[Exception], got: int | None
) -> None:
    """A reset, a truncated body and a stall break one download; the next one works."""
    hub, _ = start()
    hub.fault("^cdn", action)
    seconds = 2 if error is httpx2.ReadTimeout else 120  # the rest must not end by the clock
    raised, received = failing(hub, "model.safetensors", seconds)
    assert raised is error
    assert received <= 100_000 if got is None else received == got
    assert read_range(hub, "model.safetensors", "100000-100009")[1] == WEIGHTS[100000:100010]


def test_a_download_arrives_but_is_not_what_was_asked_for(start: Start) -> None:
    """200 for a range, an HTML page and a flipped byte look like success."""
    hub, _ = start()
    hub.fault("^cdn", ignore_range())
    assert read_range(hub, "model.safetensors", "10-19") == (200, WEIGHTS)
    hub.log.clear()
    hub.fault("^cdn", html())
    code, page = read_range(hub, "model.safetensors")
    assert code == 200
    assert page.startswith(b"<!DOCTYPE html>")
    hub.log.clear()
    hub.fault("^cdn", corrupt(5))
    code, body = read_range(hub, "model.safetensors", "100-109")
    assert body[:5] + body[6:] == WEIGHTS[100:105] + WEIGHTS[106:110]
    assert body[5] == WEIGHTS[105] ^ 0xFF


def test_a_stall_ends_when_it_is_released(start: Start) -> None:
    """A test can wait for a stall to begin, act meanwhile, and release the answer."""
    hub, _ = start()
    fault = hub.fault("^cdn", stall(1000))
    found: list[tuple] = []
    reader = threading.Thread(target=lambda: found.append(read_range(hub, "model.safetensors")))
    reader.start()
    fault.wait()
    assert not found
    fault.release()
    reader.join()
    assert found == [(200, WEIGHTS)]


def test_a_slow_answer_takes_its_time(start: Start) -> None:
    """A throttled body arrives whole at about the given rate."""
    hub, _ = start()
    hub.fault("^cdn", throttle(4_000_000))
    begun = time.monotonic()
    assert read_range(hub, "model.safetensors", "0-999999") == (206, WEIGHTS[:1_000_000])
    assert time.monotonic() - begun > 0.2


@pytest.mark.parametrize(
    ("action", "error", "done"),
    [
        (applied(500), HfHubHTTPError, True),
        (lost(), httpx2.TransportError, True),
        (status(500), HfHubHTTPError, False),
        (reset(), httpx2.TransportError, False),
        (reset_upload(20), httpx2.TransportError, False),
    ],
)
def test_a_failed_commit_may_have_been_applied(
    start: Start, action: Action, error: type[Exception], done: bool
) -> None:
    """A commit can fail before or after it took effect."""
    hub, api = start()
    hub.fault(("POST", "/commit/"), action)
    with pytest.raises(error):
        api.create_commit(DST, [add("a.txt", b"1")], commit_message="x")
    assert ("a.txt" in hub.files(DST)) == done


def test_a_token_expires_in_the_middle(start: Start) -> None:
    """From a chosen request on, the token is refused."""
    hub, _ = start()
    hub.fault("resolve", run(hub.expire), nth=3)
    codes = [read_range(hub, "model.safetensors", "0-9")[0] for _ in range(4)]
    assert codes == [206, 206, 401, 401]


@OLD_STYLE
def test_faults_reach_lfs_and_xet_uploads(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken part of an LFS upload is sent again, and so is a xorb; both uploads succeed."""
    hub, api = start(xet="http", part_size=1 << 20)
    hub.fault("^cas /v1/xorbs", reset_upload(100_000))
    hub.fault("^cas /v1/shards", status(500))
    info, _ = streamed(hub, api, DST, WEIGHTS)
    assert hub.store.path(info.sha256).read_bytes() == WEIGHTS
    assert len(hub.find("^cas /v1/xorbs")) == 2
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.fault(("PUT", "^cdn"), reset_upload(5000), nth=2)
    other = WEIGHTS[::-1]
    api.create_commit(DST, [add("w.safetensors", other)], commit_message="x")
    assert hub.read(DST, "w.safetensors") == other
    assert len(hub.find(("PUT", "^cdn"))) == 4


CHILD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
print(api.model_info(sys.argv[1]).sha, flush=True)
api.hf_hub_download(sys.argv[1], "model.safetensors")
"""


def test_a_child_process_uses_the_hub_and_can_be_killed(start: Start, tmp_path: Path) -> None:
    """A child process finds the Hub through its environment; a kill leaves the Hub intact."""
    hub, _ = start()
    fault = hub.fault("^cdn", stall(1000))
    command = [sys.executable, "-c", CHILD, SRC]
    environment = hub.env(tmp_path / "child home")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline().decode().strip() == hub.branches(SRC)["main"]
        fault.wait()
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert not hub.leaks()
