"""GGUF models on the Hub: found as llama.cpp finds them, streamed to a disk and to a repo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gguf_models import read_model, write_model
from support.hub_checkpoints import DST, Lab, laboratory

import moescale
from moescale.errors import UsageError
from moescale.storage.location import HubRef, parse_ref, ref_from_url

REPO = "lab/some-GGUF"
K3 = ("-k", "3", "--rule", "preserve")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A Hub with a repo of three models: a file, a split set in a folder, a projector."""
    with laboratory(tmp_path, monkeypatch) as lab:
        lab.start()
        folder = tmp_path / "repo"
        (folder / "Q4_K_M").mkdir(parents=True)
        write_model(folder / "m.Q8_0.gguf", kind="Q8_0")
        write_model(folder / "Q4_K_M" / "m-Q4_K_M.gguf", kind="Q4_K", split=4)
        (folder / "mmproj-m-Q8_0.gguf").write_bytes(b"GGUF")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Some models\n")
        files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        lab.hub.add_repo(REPO, files)
        yield lab


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name:Q4_K_M", HubRef("org/name", quant="Q4_K_M")),
        ("hf://org/name:UD-Q2_K_XL", HubRef("org/name", quant="UD-Q2_K_XL")),
        ("hf://org/name@rev:Q6_K", HubRef("org/name", "rev", quant="Q6_K")),
        ("hf://org/name/a/m.gguf", HubRef("org/name", None, "a/m.gguf")),
    ],
)
def test_a_model_of_a_repo_is_named(text: str, place: HubRef) -> None:
    """A part of its name or a path selects a model; references survive printing and parsing."""
    assert parse_ref(text) == place
    assert parse_ref(str(place)) == place


def test_a_quant_has_no_path_and_an_address_may_be_that_of_a_file() -> None:
    """Paths and empty names after the colon are refused; a file's address refers to the file."""
    for text in ("org/name:", "org/name:a/b", "org/name:a:b"):
        with pytest.raises(UsageError):
            parse_ref(text)
    address = "https://huggingface.co/org/name/blob/main/a/m.gguf"
    assert ref_from_url(address) == "hf://org/name@main/a/m.gguf"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (f"{REPO}:q8_0", ["m.Q8_0.gguf"]),
        (f"hf://{REPO}/m.Q8_0.gguf", ["m.Q8_0.gguf"]),
        (f"hf://{REPO}@main/Q4_K_M/m-Q4_K_M-00002-of-00003.gguf", None),
        (f"{REPO}:Q4_K_M", None),
    ],
)
def test_it_is_streamed_to_a_disk(lab: Lab, source: str, names: list[str] | None) -> None:
    """The header is read by ranges, then the files are streamed; the bytes equal a local run's."""
    out = lab.root / "out"
    lab.done(source, str(out), *K3, "--verify", "-q")
    local = lab.root / "repo" / (names[0] if names else "Q4_K_M/m-Q4_K_M-00001-of-00003.gguf")
    moescale.convert(local, lab.root / "local", experts=3, rule="preserve")
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(path.name for path in (lab.root / "local").iterdir())
    _, tensors = read_model(*[out / name for name in written])
    _, wanted = read_model(*[lab.root / "local" / name for name in written])
    assert {n: t.data.tobytes() for n, t in tensors.items()} == {
        n: t.data.tobytes() for n, t in wanted.items()
    }


def test_what_is_not_there_is_said(lab: Lab) -> None:
    """The error lists the models of the repo."""
    failure = lab.run(f"{REPO}:Q2_K", "--dry-run", *K3).failure
    assert "has no Q2_K" in failure
    assert "m.Q8_0.gguf" in failure
    assert "one of them must be given" in lab.run(REPO, "--dry-run", *K3).failure


def test_it_is_streamed_to_a_repo_with_a_card(lab: Lab) -> None:
    """The card names the source of the files; the same run again has nothing to do."""
    source = f"{REPO}:Q4_K_M"
    lab.done(source, f"hf://{DST}", *K3, "--verify", "-q")
    files = lab.output()
    parts = [name for name in files if name.endswith(".gguf")]
    assert len(parts) == 3
    assert all(name.startswith("Q4_K_M/") for name in parts)
    card = files["README.md"].decode()
    assert "base_model:\n- lab/some-GGUF" in card
    assert f"`Q4_K_M/m-Q4_K_M-00001-of-00003.gguf` of [{REPO}]" in card
    assert "--override-kv llama.expert_used_count" in card
    moescale.convert(lab.root / "repo" / parts[1], lab.root / "o", experts=3, rule="preserve")
    for name in parts[1:]:
        assert files[name] == (lab.root / "o" / name.rpartition("/")[2]).read_bytes()
    assert "already done" in lab.done(source, f"hf://{DST}", *K3).err
    refused = lab.run(source, f"hf://{DST}", "-k", "4", "--rule", "preserve", "-q")
    assert (refused.code, "holds" in refused.err) == (3, True)
