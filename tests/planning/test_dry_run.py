"""The dry run: it shows what the real run would refuse, and both closed forms by layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import checkpoints
from support import quantised_checkpoints as quantised

from moescale import api
from moescale.errors import (
    CheckpointError,
    DestinationError,
    SourceError,
    UnsupportedError,
    UsageError,
    bytes_text,
)
from moescale.report.terminal import plan_text
from moescale.storage.local.destination import LocalDestination


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete small Mixtral repo."""
    return checkpoints.mixtral(tmp_path / "source")


def with_count(source: Path, count: Any) -> Path:
    """The repo with another number of experts per token in its config."""
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "num_experts_per_tok": count}))
    return source


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process."""
    command = [sys.executable, "-m", "moescale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# The destination ----------------------------------------------------------------------------------


def test_an_occupied_destination_is_a_warning(source: Path, tmp_path: Path) -> None:
    """The plan is shown, and the warning says that the run would be refused and what to do."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    (warning,) = api.plan(source, tmp_path / "out", experts=3).warnings
    assert "would be refused" in warning and "is not empty (letter.txt)" in warning
    assert "empty this one" in warning and "\n" not in warning
    (warning,) = api.plan(source, tmp_path / "out", overwrite=True, experts=3).warnings
    assert "does not look like a model" in warning


@pytest.mark.parametrize("change", ["none", "output", "source"])
def test_an_earlier_output_is_looked_at(change: str, source: Path, tmp_path: Path) -> None:
    """An output of the same job gives no warning, unless it or its source has changed since."""
    api.convert(source, tmp_path / "out", experts=3)
    if change == "output":
        (tmp_path / "out" / "config.json").write_text("{}")
    if change == "source":
        os.utime(source / "config.json", (4e9, 4e9))
    warnings = api.plan(source, tmp_path / "out", experts=3).warnings
    said = {"none": [], "output": ["changed since"], "source": ["source is newer"]}[change]
    assert [word in warning for word, warning in zip(said, warnings, strict=True)] == [True] * len(
        said
    )


def test_a_place_that_cannot_be_written_to_is_a_warning(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the way, a missing permission and a read-only mount are reported before the run."""
    (tmp_path / "file").write_text("x")
    (warning,) = api.plan(source, tmp_path / "file" / "out", experts=3).warnings
    assert "cannot be written to" in warning and "is not a directory" in warning
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode & os.W_OK == 0 and allowed(path, mode)
    )
    (warning,) = api.plan(source, tmp_path / "out", experts=3).warnings
    assert "no permission to write. Give another destination" in warning
    flags = os.statvfs(tmp_path).f_flag | os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    (warning,) = api.plan(source, tmp_path / "out", experts=3).warnings
    assert "mounted read-only" in warning and "permission" not in warning


def test_nothing_is_written_there(source: Path, tmp_path: Path) -> None:
    """A dry run creates no folder."""
    assert api.plan(source, tmp_path / "deep" / "out", experts=3).warnings == ()
    assert not (tmp_path / "deep").exists()


def test_options_of_the_hub_need_the_hub(source: Path, tmp_path: Path) -> None:
    """The dry run refuses the same usage errors as the run."""
    with pytest.raises(UsageError, match="need hf://"):
        api.plan(source, tmp_path / "out", create_pr=True, experts=3)


def test_a_disk_that_is_too_small_is_said_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the output needs more than the free space, the plan warns, and the run continues."""
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for plan in (
        api.plan(source, tmp_path / "out", experts=3),
        api.convert(source, tmp_path / "out", experts=3).plan,
    ):
        (warning,) = plan.warnings
        assert f"needs {bytes_text(plan.bytes_written)}, but 100 B are free" in warning
    assert api.plan(source, tmp_path / "out", experts=3).warnings == ()  # the output exists already


def test_another_disk_that_is_too_small_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device is refused if too small, unless it is as free as the source (a subvolume)."""
    real, usage, free = Path.stat, shutil.disk_usage(tmp_path), {"source": 200}

    def stat(path: Path, **more: Any) -> os.stat_result:
        info = real(path, **more)
        return os.stat_result((*info[:2], 99, *info[3:])) if path == source else info

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=free.get(Path(path).name, 100))
    )
    (warning,) = api.plan(source, tmp_path / "out", experts=3).warnings
    assert "would be refused" in warning and "100 B are free. Free" in warning
    with pytest.raises(DestinationError, match="the output needs"):
        api.convert(source, tmp_path / "out", experts=3)
    assert not (tmp_path / "out").exists()
    free["source"] = 100
    assert api.convert(source, tmp_path / "out", experts=3).status == "new"


def test_what_an_unfinished_run_has_written_counts_as_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run needs space only for the rest, since its temporary files are removed."""
    written = api.plan(source, tmp_path / "out", experts=3).bytes_written
    destination = LocalDestination(tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoints.write_files(tmp_path / "out", {"a": bytes(10), ".moescale/b.tmp": bytes(written)})
    assert destination.available_bytes() == 100 + 10 + written


def test_a_disk_that_tells_nothing_is_taken_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the free space is unknown, there is no warning and no error."""

    def fail(path: Path) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    assert api.plan(source, tmp_path / "out", experts=3).warnings == ()


# The source ---------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_found_at_once(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer without read permission ends the plan, not the run after its last shard."""
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "tokenizer.json" not in str(path) and allowed(path, mode)
    )
    with pytest.raises(SourceError, match=r"'tokenizer.json' cannot be read") as caught:
        api.plan(source, experts=3)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["README.md", "moescale.json", "model.safetensors.index.json"])
def test_a_folder_in_the_place_of_a_file_is_found_at_once(name: str, source: Path) -> None:
    """A folder with the name of a file that a run writes is refused before the run."""
    (source / name).unlink(missing_ok=True)
    (source / name).mkdir()
    (source / name / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=f"{name}: is a folder"):
        api.plan(source, experts=3)


@pytest.mark.parametrize(
    "name",
    ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"],
)
@pytest.mark.parametrize(
    ("content", "what", "help_"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head></head></html>", "web page", "Fetch it again"),
        (b"<Error><Code>AccessDenied</Code></Error>", "web page", "Fetch it again"),
        (b"\n <BODY>503 Service Unavailable</BODY>", "web page", "Fetch it again"),
    ],
)
def test_what_stands_in_place_of_a_file_is_called_so(
    source: Path, name: str, content: bytes, what: str, help_: str
) -> None:
    """A Git LFS pointer or a web page under the name of a file is recognised."""
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: is a {what}") as caught:
        api.plan(source, experts=3)
    assert help_ in (caught.value.hint or "")


def test_a_count_of_null_is_called_so(source: Path) -> None:
    """The error distinguishes null from a missing key."""
    with pytest.raises(UnsupportedError, match="has null at num_experts_per_tok"):
        api.plan(with_count(source, None), experts=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [("part", ""), ("arch", ""), ("pattern", ""), ("experts_key", "")],
)
def test_an_empty_name_is_refused(option: str, value: str, source: Path) -> None:
    """An empty value, for instance from an unset variable, is a usage error."""
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is empty"):
        api.plan(source, experts=3, **{option: value})


def test_a_wider_scale_is_shown(tmp_path: Path) -> None:
    """If a scale becomes F32 and its shard longer, the plan says so."""
    case = next(c for c in quantised.EXACT if c.id == "block FP8, BF16 scales")
    quantised.write(case, tmp_path / "in")
    assert "BF16 -> F32" in plan_text(api.plan(tmp_path / "in", factor=1.37))
    assert "-> F32" not in plan_text(api.plan(tmp_path / "in", factor=1.0))


# Counts by layer ----------------------------------------------------------------------------------


def test_both_forms_are_given_by_layer(source: Path) -> None:
    """If layers have different counts, each rule has a factor and a norm for each layer."""
    plan = api.plan(with_count(source, [1, 2]), experts=2)
    root = 2**0.5
    assert dict(plan.factors) == {"0": root, "1": 1.0}
    assert plan.as_json()["alternatives"] == {
        "preserve": {"0": root, "1": 1.0},
        "published": {"0": 0.5**0.5, "1": 1.0},
    }
    norm = plan.predicted_norm
    assert norm["none"] == {"0": 1 / root, "1": 1.0} and norm["preserve"] == 1.0
    assert norm["published"] == {"0": pytest.approx(0.5), "1": 1.0}
    text = plan_text(plan)
    assert "1,2 -> 2" in text and "1 to 1.41421" in text and "0.707107 to 1" in text
    assert "x 0.500 to 1.000" in text


def test_a_list_that_is_too_short_is_refused(source: Path) -> None:
    """A list of counts needs one for each layer."""
    with pytest.raises(CheckpointError, match="has 1 numbers for 2 layers"):
        api.plan(with_count(source, [2]), experts=2)


def test_a_fold_into_the_config_says_that_no_weight_changed(tmp_path: Path) -> None:
    """The summary of `--fold config` says that no weight changed."""
    source = checkpoints.deepseek(tmp_path / "in", routed_scaling_factor=2.5)
    done = run(source, tmp_path / "out", "-k", 3, "--fold", "config")
    assert done.returncode == 0
    assert "0 B changed" in done.stderr and "no weight changed" in done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["routed_scaling_factor"] == pytest.approx(2.5 * 1.5**0.5)


@pytest.mark.parametrize("value", [None, "2.5", True, [1], 1e308, float("nan")])
def test_a_scaling_key_that_is_no_number_is_refused(value: Any, tmp_path: Path) -> None:
    """The error has one line and a hint."""
    source = checkpoints.deepseek(tmp_path / "in", routed_scaling_factor=value)
    with pytest.raises(UnsupportedError, match="cannot be multiplied") as caught:
        api.plan(source, factor=1e9, fold="config")
    assert "\n" not in caught.value.message and caught.value.hint


def test_a_scaling_key_that_no_loader_sees_is_refused(tmp_path: Path) -> None:
    """Of a section that occurs twice, loaders read the last; the first would hold the factor."""
    source = checkpoints.deepseek(tmp_path / "in")
    path = source / "config.json"
    twice = '{"text_config": {"routed_scaling_factor": 2.5}, "text_config": {}, '
    path.write_text(path.read_text("utf-8").replace("{", twice, 1), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="has no routed_scaling_factor"):
        api.plan(source, factor=2.0, fold="config")
    assert api.plan(source, factor=2.0).overrides == {}


# Files with factors -------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_fault(source: Path, tmp_path: Path) -> None:
    """Editors on Windows write one before the JSON."""
    (tmp_path / "f.json").write_text('{"0": 1.1, "1": 1.2}', encoding="utf-8-sig")
    done = run(source, tmp_path / "out", "--factors", tmp_path / "f.json", "-q")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ('{"0": 1, "1": -1}', "the factor of layer 1 is -1.0"),
        ('{"factors": [1, 2]}', "has no factors"),
        (
            '{"factors": {"0": 1, "1": 1}, "router_scales": {"0": 1, "1": 0}}',
            "f.json: the router scale of layer 1 is 0.0",
        ),
    ],
)
def test_a_bad_factor_is_named(factors: str, says: str, source: Path, tmp_path: Path) -> None:
    """The error names the layer, or says what the file must contain."""
    (tmp_path / "f.json").write_text(factors)
    done = run(source, tmp_path / "out", "--factors", tmp_path / "f.json")
    assert done.returncode == 2 and says in done.stderr and done.stdout == ""


# Streams ------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="closing a stream is written so in POSIX shells")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(closed: str, source: Path, tmp_path: Path) -> None:
    """Text for a stream that the caller closed is dropped, and does not go to another stream."""
    out = tmp_path / "out"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "moescale"]
    done = subprocess.run(
        [*command, source, out, "-k", "3", "--verify"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout == (f"{out}\n" if closed == "2>&-" else "")
    assert "Traceback" not in done.stderr
    assert api.verify(source, out, experts=3).verified
