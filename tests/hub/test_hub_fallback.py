"""A client that lacks a name that streaming needs: shards go through the public API instead."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, Lab, rescaled
from support.hub_faults import status

from moescale.storage.hub import destination as hub_destination
from moescale.storage.hub.upload import STREAM_NAMES

NAMES = [
    (module, kind, name)
    for module, kinds in STREAM_NAMES.items()
    for kind, names in kinds.items()
    for name in names
]


def hide(lab: Lab, module: str, kind: str, name: str) -> None:
    """Remove this attribute from a class of a module; existing objects stay as they are."""
    found: Any = importlib.import_module(module)
    original = getattr(found, kind)

    class Without(type(original)):  # type: ignore[misc]
        def __getattribute__(cls, wanted: str) -> Any:
            if wanted == name:
                raise AttributeError(wanted)
            return super().__getattribute__(wanted)

    if module == "huggingface_hub":
        lab.monkeypatch.setattr(found, kind, Without(kind, (original,), {}))
        lab.monkeypatch.setattr(hub_destination, "add_uploaded", None)
    else:
        kept = {n: None for n in STREAM_NAMES[module][kind] if n != name}
        lab.monkeypatch.setattr(found, kind, SimpleNamespace(**kept))


@pytest.mark.parametrize(("module", "kind", "name"), NAMES, ids=[".".join(n) for n in NAMES])
def test_a_client_without_a_name_sends_the_same_bytes(
    lab: Lab, module: str, kind: str, name: str
) -> None:
    """Each shard goes through a temporary file, and a warning says so."""
    lab.start()
    hide(lab, module, kind, name)
    outcome = lab.done(SRC, PLACE, "-k", "3")
    output = lab.output()
    assert {shard: output[shard] for shard in SHARDS} == rescaled(lab.source)
    assert f"the installed client has no {module}.{kind}.{name};" in outcome.err


def test_a_client_without_a_name_resumes(lab: Lab) -> None:
    """Shards that an earlier run sent are copied from its branch, not sent again."""
    hub = lab.start(xet=False)
    hide(lab, "huggingface_hub", "CommitOperationAdd", "_is_uploaded")
    hub.fault(("POST", r"^api /api/models/me/out/commit/"), status(403), nth=4)
    assert lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1").code == 3
    hub.log.clear()
    lab.done(SRC, PLACE, "-k", "3", "-q", "-j", "1")
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)
    sent, _ = hub.traffic()
    assert sent < len(lab.source[SHARDS[0]])


def test_what_the_hub_calls_small_goes_into_the_commit(lab: Lab) -> None:
    """A file that the Hub wants as a regular file, although it is large, arrives."""
    hub = lab.start(xet=False)
    words = b"some words\n" * 800_000
    hub.commit(SRC, {"words.txt": words})
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert hub.read(DST, "words.txt") == words
    assert hub.files(DST)["words.txt"].lfs is False
