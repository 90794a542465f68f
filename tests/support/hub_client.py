"""Starts loopback Hubs for tests and points the `huggingface_hub` of this process at them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.hub_server import Hub

if TYPE_CHECKING:
    import pytest
    from huggingface_hub import HfApi

SRC, DST = "lab/source", "me/out"
WEIGHTS = random.Random(1).randbytes(3 << 20)
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "sub/deep/tokenizer.json": b"{}" * 100,
    "sub/vocab.txt": b"a\nb\n",
}
Start = Callable[..., "tuple[Hub, HfApi]"]


@contextmanager
def connected(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """Yield a client of this Hub that uses no setting, token or cache of the machine."""
    for name, value in hub.env(home).items():
        if name.startswith("HF_") or name.upper() == "NO_PROXY":
            monkeypatch.setenv(name, value)
    from huggingface_hub import HfApi, close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield HfApi(endpoint=hub.endpoint, token=hub.token)
    close_session()


@contextmanager
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Yield a function that starts a Hub with a source repo and an empty destination."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    with ExitStack() as stack:

        def start(**settings: Any) -> tuple[Hub, HfApi]:
            hub = stack.enter_context(Hub(tmp_path / "hub", **settings))
            api = stack.enter_context(connected(hub, tmp_path / "home", monkeypatch))
            hub.add_repo(SRC, FILES)
            api.create_repo(DST)
            hub.log.clear()
            return hub, api

        disable_progress_bars()
        yield start
    enable_progress_bars()


def read_range(hub: Hub, path: str, wanted: str | None = None) -> tuple[int, bytes]:
    """Read a file of the source as moescale does: in one stream, following redirects."""
    from huggingface_hub import get_session, hf_hub_url

    headers = {"Authorization": f"Bearer {hub.token}", "Accept-Encoding": "identity"}
    if wanted:
        headers["Range"] = f"bytes={wanted}"
    url = hf_hub_url(SRC, path, endpoint=hub.endpoint)
    with get_session().stream("GET", url, headers=headers, timeout=120) as response:
        return response.status_code, b"".join(response.iter_raw())
