"""From directory to directory: every byte of the output, however the run goes."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints
from support.gated_checkpoints import gated_mixtral

from moescale.api import convert, plan, verify
from moescale.checkpoint import rewrite as checkpoint_rewrite
from moescale.checkpoint.editors import Editors
from moescale.conversion import executor
from moescale.conversion import run as run_module
from moescale.errors import (
    DestinationError,
    InterruptedRun,
    RewriteError,
    UsageError,
    VerificationError,
)
from moescale.planning import provenance
from moescale.planning.plan import Plan
from moescale.storage import reader as files
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.journal import JOURNAL, STATE

UP, DOWN = math.sqrt(3 / 2), math.sqrt(2 / 3)
MADE = {"README.md", "moescale.json", "config.json"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete small Mixtral repo, with twins of its weights and a model in a subfolder."""
    folder = checkpoints.mixtral(tmp_path / "source")
    side = checkpoints.shard({"linear.weight": checkpoints.values("F32", (2,))})
    checkpoints.write_files(folder, {**checkpoints.LEFT_OUT, "side/model.safetensors": side})
    return folder


def factor_by_layer(factor: float, **others: float) -> Callable[[str], float]:
    """From a tensor's name to its factor; `others` are those of layers named like ``l1``."""

    def find(name: str) -> float:
        layer = name.partition("layers.")[2].partition(".")[0]
        return others.get("l" + layer, factor)

    return find


def check_weights(
    source: Path, output: Path, factor: Callable[[str], float], made: set[str] = MADE
) -> None:
    """Assert that shards are rescaled byte for byte and all other files are verbatim."""
    before, after = checkpoints.tree(source), checkpoints.tree(output)
    left_out = {*checkpoints.LEFT_OUT, *checkpoints.NO_CHECKPOINT}
    assert after.keys() == (before.keys() - left_out) | made
    for name in after.keys() - made:
        expected = before[name]
        if name.endswith(".safetensors"):
            names = checkpoints.routed(checkpoints.spans(expected))
            expected = checkpoints.rescaled(expected, {n: factor(n) for n in names})
        assert after[name] == expected, name


def config_count(output: Path) -> int:
    """The experts per token in the output's config."""
    return json.loads((output / "config.json").read_bytes())["num_experts_per_tok"]


# Byte for byte ------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], float, int]] = {
    "preserve": ({"experts": 3}, UP, 3),
    "published": ({"experts": 3, "rule": "published"}, DOWN, 3),
    "none": ({"experts": 3, "rule": "none"}, 1.0, 3),
    "fewer": ({"experts": 1}, math.sqrt(1 / 2), 1),
    "merge of dense models": ({"experts": 4, "trained_experts": 1}, 2.0, 4),
    "rho": ({"experts": 4, "rho": 0.5}, math.sqrt((0.25 + 0.5) / (0.125 + 0.5)), 4),
    "full rho": ({"experts": 4, "rho": 1.0}, 1.0, 4),
    "factor": ({"factor": 0.7}, 0.7, 2),
    "factor and experts": ({"factor": 0.7, "experts": 4}, 0.7, 4),
    "factor of one": ({"factor": 1.0, "experts": 3}, 1.0, 3),
}


@pytest.mark.parametrize(("options", "factor", "count"), CASES.values(), ids=CASES)
def test_mixtral_byte_for_byte(
    source: Path, tmp_path: Path, options: dict[str, Any], factor: float, count: int
) -> None:
    """Routed down-projections are scaled, one number in the config changes, all else is copied."""
    convert(source, tmp_path / "out", **options)
    check_weights(source, tmp_path / "out", factor_by_layer(factor))
    config = checkpoints.MIXTRAL_CONFIG.replace("\t2 ,", f"\t{count} ,")
    assert (tmp_path / "out" / "config.json").read_bytes() == config.encode()


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_other_dtypes_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    """Each dtype is scaled in that dtype."""
    source = checkpoints.mixtral(tmp_path / "source", dtype=dtype, extras=False)
    result = convert(source, tmp_path / "out", experts=3)
    factor = result.plan.factors["0"]
    assert factor == pytest.approx(UP, rel=1e-15)
    check_weights(source, tmp_path / "out", factor_by_layer(factor))


def test_fused_experts_byte_for_byte(tmp_path: Path) -> None:
    """One tensor has all experts of a layer, in a single shard without an index."""
    source = checkpoints.fused_mixtral(tmp_path / "source")
    convert(source, tmp_path / "out", experts=3)
    check_weights(source, tmp_path / "out", factor_by_layer(UP))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(("flag", "factor"), [(False, DOWN), (True, UP)])
def test_qwen_goes_by_its_flag(tmp_path: Path, flag: bool, factor: float) -> None:
    """A router that does not renormalise gets the inverse factor; shared experts stay."""
    source = checkpoints.qwen2(tmp_path / "source")
    config = json.dumps({**checkpoints.QWEN2_CONFIG, "norm_topk_prob": flag})
    (source / "config.json").write_text(config)
    convert(source, tmp_path / "out", experts=3)
    check_weights(source, tmp_path / "out", factor_by_layer(factor))


def test_deepseek_scales_its_mtp_block_too(tmp_path: Path) -> None:
    """Dense layer, shared experts and routers stay; the block after the last layer is scaled."""
    source = checkpoints.deepseek(tmp_path / "source")
    result = convert(source, tmp_path / "out", experts=3)
    assert set(result.plan.factors) == {"1", "2", "3"}
    check_weights(source, tmp_path / "out", factor_by_layer(UP))


def test_factors_by_layer(source: Path, tmp_path: Path) -> None:
    """Each layer gets its own factor; the config keeps its number."""
    convert(source, tmp_path / "out", factors={"0": 1.0, "1": 0.25})
    check_weights(source, tmp_path / "out", factor_by_layer(1.0, l1=0.25))
    assert config_count(tmp_path / "out") == 2


def test_factors_of_an_earlier_output(source: Path, tmp_path: Path) -> None:
    """The factors of a ``moescale.json`` give the same weights again."""
    first = convert(source, tmp_path / "one", experts=3)
    convert(source, tmp_path / "two", factors=dict(first.plan.factors), experts=3)
    one, two = checkpoints.tree(tmp_path / "one"), checkpoints.tree(tmp_path / "two")
    for name in one.keys() - {"README.md", "moescale.json"}:
        assert one[name] == two[name]


@pytest.mark.parametrize(
    ("made_for", "options", "says"),
    [
        ({}, {"experts": 3}, None),
        (
            {},
            {"experts": 4},
            "made with -k 3, this run has 4",
        ),
        ({}, {}, "made with -k 3, this run has 2"),
        ({}, {"experts": 3, "trained_experts": 1}, "made with -n 2, this run has 1"),
        ({"experts": None}, {"experts": 4}, None),
        (
            {"experts": {"trained": [2, 4], "to": 3}},
            {"experts": 3},
            "made with -n [2, 4], this run has 2",
        ),
        ({"gate_scale": 1.5}, {"experts": 3, "gate_scale": 1.5}, None),
        ({"gate_scale": 1.5}, {"experts": 3}, "made with --gate-scale 1.5, this run has 1.0"),
        ({"gate_scale": 10**400}, {"experts": 3}, "made with --gate-scale 1000"),
        ({}, {"experts": 3, "gate_scale": 2}, "made with --gate-scale 1.0, this run has 2"),
        (
            {"model_type": "olmoe"},
            {"experts": 3},
            "made with model type olmoe, this run has mixtral",
        ),
        ({"calibration": {"text_sha256": 1, "tokens": 1}}, {"experts": 3}, None),
    ],
)
def test_factors_that_were_made_for_another_job_are_warned_of(
    tmp_path: Path, made_for: Any, options: Any, says: str | None
) -> None:
    """The file gives its numbers, routers and model type; each difference is named."""
    source, file = tmp_path / "source", tmp_path / "plan.json"
    gated_mixtral(source)
    file.write_text(json.dumps({**plan(source, experts=3).as_json(), **made_for}))
    found = plan(source, factors=file, **options)
    warnings = [warning for warning in found.warnings if "--factors" in warning]
    assert len(warnings) == (says is not None)
    assert (says or "") in "".join(warnings)
    assert found.calibration == {}


def test_bare_factors_say_nothing_of_their_job(source: Path) -> None:
    """A mapping of factors is accepted for any numbers of experts."""
    for experts in (None, 1, 4):
        found = plan(source, factors={"0": 1.0, "1": 2.0}, experts=experts)
        assert not any("--factors" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "given", [{"0": 1.0}, {"0": 1.0, "1": 1.0, "2": 1.0}, {"0": 1.0, "x": 1.0}]
)
def test_factors_must_fit_the_layers(source: Path, tmp_path: Path, given: dict[str, float]) -> None:
    """A layer without a factor, or a factor without a layer, is refused before anything else."""
    with pytest.raises(UsageError, match="layer"):
        convert(source, tmp_path / "out", factors=given)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_several_pieces(tmp_path: Path) -> None:
    """Tensors that are larger than a piece, at odd offsets, are right to the last byte."""
    tensors = checkpoints.fused_mixtral_tensors(layers=1)
    tensors = {"odd": ("U8", (3,), b"abc"), **tensors}
    big = checkpoints.values("BF16", (4, 301, 997), special=False)
    tensors["model.layers.0.mlp.experts.down_proj"] = big
    wide = checkpoints.values("BF16", (4, 2 * 997, 301), special=False)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = wide
    checkpoints.write_shards(tmp_path / "source", tensors, 1)
    config = {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 4}
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    convert(tmp_path / "source", tmp_path / "out", experts=3, verify=True)
    check_weights(tmp_path / "source", tmp_path / "out", factor_by_layer(UP))


# The other files ----------------------------------------------------------------------------------


def test_every_file_is_accounted_for(source: Path) -> None:
    """The plan has a row for each file of the source, and the reason if it is left out."""
    rows = {f.name: f for f in plan(source, experts=3).files}
    for name in checkpoints.LEFT_OUT:
        assert rows[name].action == "skip"
        assert rows[name].why
    for name in checkpoints.EXTRAS.keys() - {"README.md"}:
        assert rows[name].action == "copy"
    actions = {name: rows[name].action for name in MADE}
    assert actions == {"README.md": "edit", "config.json": "edit", "moescale.json": "create"}
    assert not rows.keys() & checkpoints.NO_CHECKPOINT.keys()


def test_the_provenance_lists_what_is_there(source: Path, tmp_path: Path) -> None:
    """The provenance lists all other files with their sizes, and with digests if known."""
    convert(source, tmp_path / "out", experts=3)
    content = json.loads((tmp_path / "out" / "moescale.json").read_bytes())
    tree = checkpoints.tree(tmp_path / "out")
    sizes = {name: len(data) for name, data in tree.items() if name != "moescale.json"}
    assert {f["name"]: f["size"] for f in content["files"]} == sizes
    assert all(f["sha256"] for f in content["files"] if f["name"] in ("config.json", "README.md"))


def test_shards_without_an_index_get_one(source: Path, tmp_path: Path) -> None:
    """Loaders need an index for several shards, so it is made."""
    index = source / "model.safetensors.index.json"
    wanted = json.loads(index.read_bytes())
    index.unlink()
    convert(source, tmp_path / "out", experts=3)
    made = json.loads((tmp_path / "out" / index.name).read_bytes())
    assert made == {**wanted, "weight_map": dict(sorted(wanted["weight_map"].items()))}
    check_weights(source, tmp_path / "out", factor_by_layer(UP), MADE | {index.name})


def test_a_source_without_a_card_gets_one(source: Path, tmp_path: Path) -> None:
    """The output describes itself, even if the source has no card."""
    (source / "README.md").unlink()
    convert(source, tmp_path / "out", experts=3)
    assert b"3 experts per token" in (tmp_path / "out" / "README.md").read_bytes()


def test_the_source_is_never_touched(source: Path, tmp_path: Path) -> None:
    """No file of the source is written, created, removed or touched."""
    before = checkpoints.tree(source)
    stats = {name: (source / name).stat().st_mtime_ns for name in before}
    convert(source, tmp_path / "out", experts=3, verify=True)
    assert checkpoints.tree(source) == before
    assert {name: (source / name).stat().st_mtime_ns for name in before} == stats


def test_a_source_in_the_hub_cache(source: Path, tmp_path: Path) -> None:
    """A snapshot of links becomes a directory of files, and the card names the repo."""
    cache, commit = tmp_path / "models--org--tiny", "0" * 40
    (cache / "blobs").mkdir(parents=True)
    for number, (name, data) in enumerate(checkpoints.tree(source).items()):
        if name.startswith((".git/", ".cache/")):
            continue
        (cache / "blobs" / str(number)).write_bytes(data)
        link = cache / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(os.path.relpath(cache / "blobs" / str(number), link.parent)))
    convert(cache / "snapshots" / commit, tmp_path / "out", experts=3)
    check_weights(source, tmp_path / "out", factor_by_layer(UP))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert b"org/tiny" in (tmp_path / "out" / "README.md").read_bytes()


def test_a_source_of_links_becomes_files(source: Path, tmp_path: Path) -> None:
    """A config next to links to shards elsewhere: this is how people try other numbers."""
    own = tmp_path / "own"
    own.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (own / path.name).symlink_to(path, target_is_directory=path.is_dir())
    (own / "config.json").write_bytes((source / "config.json").read_bytes())
    convert(own, tmp_path / "out", experts=3, verify=True)
    check_weights(source, tmp_path / "out", factor_by_layer(UP))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("run", [convert, plan])
def test_a_destination_that_links_of_the_source_lead_to_is_refused(
    source: Path, tmp_path: Path, run: Callable[..., object]
) -> None:
    """Replacing it would remove the very weights that are read."""
    own, before = tmp_path / "own", checkpoints.tree(source)
    own.mkdir()
    for name in before:
        if "/" not in name:
            (own / name).symlink_to(source / name)
    with pytest.raises(UsageError, match=f"{source}: holds the target"):
        run(own, source, experts=3, overwrite=True)
    assert checkpoints.tree(source) == before


# The same bytes, however the run goes -------------------------------------------------------------


def test_any_number_of_jobs_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Shards may be processed one after the other or all at once."""
    convert(source, tmp_path / "one", experts=3, jobs=1)
    convert(source, tmp_path / "four", experts=3, jobs=4)
    assert checkpoints.tree(tmp_path / "one") == checkpoints.tree(tmp_path / "four")


def test_the_place_does_not_matter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same source through other paths gives the same bytes."""
    convert(source, tmp_path / "one", experts=3)
    monkeypatch.chdir(tmp_path)
    convert("source", "deep/down/two", experts=3)
    assert checkpoints.tree(tmp_path / "one") == checkpoints.tree(tmp_path / "deep/down/two")


def test_without_copies_in_the_kernel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems without `copy_file_range` and `preadv` write the same bytes."""
    convert(source, tmp_path / "one", experts=3)
    monkeypatch.delattr(os, "copy_file_range", raising=False)

    def read_at(fd: int, buffer: memoryview, offset: int) -> int:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    monkeypatch.setattr(files, "_read_at", read_at)
    convert(source, tmp_path / "two", experts=3)
    assert checkpoints.tree(tmp_path / "one") == checkpoints.tree(tmp_path / "two")


KILLED = """
import os, sys
from moescale.api import convert
from moescale.storage.local.destination import LocalDestination
left, when, commit = int(sys.argv[3]), sys.argv[4], LocalDestination.commit_file
def commit_file(self, *args):
    global left
    left -= 1
    if left < 0 and when == "before":
        os._exit(9)
    result = commit(self, *args)
    if left < 0:
        os._exit(9)
    return result
LocalDestination.commit_file = commit_file
convert(sys.argv[1], sys.argv[2], experts=3, jobs=1, overwrite=len(sys.argv) > 5)
"""


def killed(source: Path, output: Path, after: int, when: str, *more: str) -> bool:
    """Run in another process that dies at file number `after`; returns whether it did."""
    command = [sys.executable, "-c", KILLED, source, output, str(after), when, *more]
    code = subprocess.run(command, check=False).returncode
    assert code in (0, 9)
    return code == 9


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Mixtral with three shards and few other files."""
    source = checkpoints.mixtral(tmp_path / "source", extras=False)
    checkpoints.write_files(source, {"extra/a.txt": b"a", "README.md": b"# Tiny\n"})
    return source


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_run_is_resumed_at_any_file(small: Path, tmp_path: Path, when: str) -> None:
    """Killed at each file in turn and then resumed: the same bytes, and nothing loads before."""
    convert(small, tmp_path / "whole", experts=3)
    whole = checkpoints.tree(tmp_path / "whole")
    for number in range(len(whole)):
        output = tmp_path / f"{when}{number}"
        assert killed(small, output, number, when)
        last = number == len(whole) - 1 and when == "after"
        assert (output / "config.json").exists() == last
        result = convert(small, output, experts=3)
        assert result.status == "resume"
        assert checkpoints.tree(output) == whole


def test_finished_shards_are_not_written_again(small: Path, tmp_path: Path) -> None:
    """A rerun starts with the first file that is not finished."""
    output = tmp_path / "out"
    assert killed(small, output, 3, "before")
    done = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    assert done
    convert(small, output, experts=3)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_a_shard_that_was_damaged_meanwhile_is_done_again(small: Path, tmp_path: Path) -> None:
    """A finished shard that has changed is not trusted."""
    output = tmp_path / "out"
    assert killed(small, output, 4, "before")
    for shard in output.glob("*.safetensors"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    convert(small, output, experts=3)
    convert(small, tmp_path / "whole", experts=3)
    assert checkpoints.tree(output) == checkpoints.tree(tmp_path / "whole")


def test_an_interrupted_overwrite_goes_on_without_the_option(small: Path, tmp_path: Path) -> None:
    """The old output never loads again, and the new one has none of its files."""
    output = tmp_path / "out"
    convert(small, output, experts=4)
    (output / "old.txt").write_bytes(b"old")
    assert killed(small, output, 2, "before", "overwrite")
    assert not (output / "config.json").exists()
    convert(small, output, experts=3)
    convert(small, tmp_path / "whole", experts=3)
    assert checkpoints.tree(output) == checkpoints.tree(tmp_path / "whole")


def test_an_interrupt_leaves_a_run_that_can_be_continued(small: Path, tmp_path: Path) -> None:
    """An exception from the progress callback stops the threads; the next run continues."""

    def stop(name: str, size: int) -> None:
        if name.startswith("model-00002"):
            raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        convert(small, tmp_path / "out", experts=3, jobs=2, progress=stop)
    assert not (tmp_path / "out" / "config.json").exists()
    assert convert(small, tmp_path / "out", experts=3).status == "resume"
    convert(small, tmp_path / "whole", experts=3)
    assert checkpoints.tree(tmp_path / "out") == checkpoints.tree(tmp_path / "whole")


def test_progress_counts_every_byte(source: Path, tmp_path: Path) -> None:
    """The reported sizes add up to the bytes that the plan streams."""
    sizes: list[int] = []
    result = convert(source, tmp_path / "out", experts=3, progress=lambda _, n: sizes.append(n))
    assert sum(sizes) == result.plan.bytes_streamed


# Finished, stale and foreign outputs --------------------------------------------------------------


def test_a_done_run_does_nothing(source: Path, tmp_path: Path) -> None:
    """The second run writes nothing, and no timestamp changes."""
    assert convert(source, tmp_path / "out", experts=3).status == "new"
    paths = list((tmp_path / "out").rglob("*"))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}
    assert convert(source, tmp_path / "out", experts=3).status == "done"
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before} == before


@pytest.mark.parametrize("options", [{"experts": 2}, {"factor": 1.0}, {"experts": 2, "rho": 0.5}])
def test_where_nothing_changes_nothing_is_written(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """With the trained number and factors of 1, the model is not copied."""
    result = convert(source, tmp_path / "out", **options)
    assert (result.status, result.verified) == ("nothing", False)
    assert "nothing to do" in result.plan.warnings[-1]
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", factor=1.1).status == "new"


SAID_OTHERWISE: dict[str, dict[str, Any]] = {
    "its rule": {"experts": 3, "rule": "preserve"},
    "rho": {"experts": 3, "rho": 0.0},
    "trained": {"experts": 3, "trained_experts": 2},
    "type": {"experts": 3, "arch": "mixtral"},
    "fold": {"experts": 3, "fold": "weights"},
    "factor": {"experts": 3, "factor": UP},
    "factors": {"experts": 3, "factors": {0: UP, 1: UP}},
    "last digit": {"experts": 3, "factor": math.nextafter(UP, 2)},
    "gate": {"experts": 3, "gate_scale": 1.0},
    "pattern": {
        "experts": 3,
        "pattern": r".*\.experts\.\d+\.w2\.weight",
        "experts_key": "num_experts_per_tok",
        "factor": UP,
    },
}


@pytest.mark.parametrize("options", SAID_OTHERWISE.values(), ids=SAID_OTHERWISE)
def test_the_same_job_in_other_words(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Options with the same meaning find the job done, and keep the first run's wording."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    before = checkpoints.tree(out)
    assert convert(source, out, **options).status == "done"
    assert convert(source, out, verify=True, **options).status == "done"
    assert verify(source, out, **options).verified
    after = checkpoints.tree(out)
    assert {n: d for n, d in after.items() if n != "moescale.json"} == {
        n: d for n, d in before.items() if n != "moescale.json"
    }
    assert json.loads(after["moescale.json"])["options"] == {"experts": 3}


@pytest.mark.parametrize("options", SAID_OTHERWISE.values(), ids=SAID_OTHERWISE)
def test_an_unfinished_run_goes_on_in_other_words(
    small: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """It ends with the bytes that the first run would have written."""
    convert(small, tmp_path / "whole", experts=3)
    assert killed(small, tmp_path / "out", 2, "before")
    assert convert(small, tmp_path / "out", **options).status == "resume"
    assert checkpoints.tree(tmp_path / "out") == checkpoints.tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        {"rule": 3},
        {"rule": "best"},
        {"experts": "3"},
        {"factor": 10**400},
        {"nothing": 1},
        {"pattern": ["x"]},
        7,
        None,
    ],
)
def test_words_that_make_no_sense_are_not_taken(source: Path, tmp_path: Path, options: Any) -> None:
    """If recorded options make no sense, the error says that the output was changed."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    content = json.loads((out / "moescale.json").read_text())
    (out / "moescale.json").write_text(json.dumps({**content, "options": options}))
    with pytest.raises(DestinationError, match="was changed since"):
        convert(source, out, experts=3)


def test_a_record_is_read_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run decodes the output's record once; its verification decodes the bytes it verifies."""
    decode, seen = provenance.decode, []
    monkeypatch.setattr(provenance, "decode", lambda data: seen.append(data) or decode(data))
    convert(source, tmp_path / "out", experts=3)
    assert seen == []
    with pytest.raises(DestinationError, match="this run has 4 experts"):
        convert(source, tmp_path / "out", experts=4)
    assert len(seen) == 1
    convert(source, tmp_path / "out", experts=3, verify=True)
    assert len(seen) == 3


def test_overwrite_writes_again(source: Path, tmp_path: Path) -> None:
    """A finished output is written again too: only a verification would find damage in it."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    before = checkpoints.tree(out)
    damage(out / "model-00001-of-00003.safetensors")
    assert convert(source, out, experts=3).status == "done"
    assert convert(source, out, experts=3, overwrite=True).status == "replace"
    assert checkpoints.tree(out) == before


def damage(path: Path) -> None:
    """Flip a bit in the middle of a file, and keep its times."""
    info, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_a_repair_writes_what_differs_and_nothing_else(source: Path, tmp_path: Path) -> None:
    """Verifying with --overwrite rewrites damaged and missing files and removes extra ones."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    before = checkpoints.tree(out)
    kept = (out / "model-00002-of-00003.safetensors").stat()
    damage(out / "model-00001-of-00003.safetensors")
    (out / "model-00003-of-00003.safetensors").unlink()
    (out / "surplus.txt").write_text("mine")
    with pytest.raises(VerificationError) as caught:
        verify(source, out, experts=3)
    names = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "surplus.txt")
    assert set(caught.value.files) == set(names)
    assert all(name in caught.value.message for name in names)
    assert "--verify --overwrite" in (caught.value.hint or "")
    sizes: list[int] = []
    result = convert(
        source, out, experts=3, verify=True, overwrite=True, progress=lambda _, n: sizes.append(n)
    )
    assert (result.status, result.verified) == ("repair", True)
    assert {n: d for n, d in checkpoints.tree(out).items() if n != "moescale.json"} == {
        n: d for n, d in before.items() if n != "moescale.json"
    }
    assert (out / "model-00002-of-00003.safetensors").stat().st_ino == kept.st_ino
    listed = json.loads((out / "moescale.json").read_text())["files"]
    assert [f["name"] for f in listed if f["sha256"] is None] == []
    assert verify(source, out).verified
    again = convert(source, out, experts=3, verify=True, overwrite=True)
    assert (again.status, again.verified) == ("done", True)


def test_the_options_of_an_output_are_taken_from_it(source: Path, tmp_path: Path) -> None:
    """A verification without options uses those of the output."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--experts is missing"):
        convert(source, out, verify=True)
    convert(source, out, experts=3, rule="published", rho=None)
    assert convert(source, out, verify=True).plan.options.rule == "published"
    with pytest.raises(
        VerificationError, match="was made with experts=3, rule=published"
    ) as caught:
        verify(source, out, experts=4)
    assert "its own are used" in (caught.value.hint or "")
    convert(source, tmp_path / "default", experts=3)
    with pytest.raises(VerificationError, match=r"made with experts=3 \(preserve, by default\)"):
        verify(source, tmp_path / "default", experts=3, rule="published")


@pytest.mark.parametrize(
    "options", [{"experts": 4}, {"experts": 3, "rule": "none"}, {"experts": 3, "rho": 0.5}]
)
def test_another_job_is_refused(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """An output with other options stays; the error names both."""
    convert(source, tmp_path / "out", experts=3)
    before = checkpoints.tree(tmp_path / "out")
    with pytest.raises(
        DestinationError, match=r"holds source with 3 experts per token \(preserve\); this run has"
    ) as caught:
        convert(source, tmp_path / "out", **options)
    assert "--overwrite" in (caught.value.hint or "")
    assert checkpoints.tree(tmp_path / "out") == before


def test_an_unfinished_run_of_other_options_is_refused(small: Path, tmp_path: Path) -> None:
    """Shards of two jobs are never mixed."""
    assert killed(small, tmp_path / "out", 2, "before")
    with pytest.raises(DestinationError, match="other options"):
        convert(small, tmp_path / "out", experts=4)


def test_an_unfinished_run_of_a_changed_source_is_refused(small: Path, tmp_path: Path) -> None:
    """Shards of two versions of a source are never mixed."""
    assert killed(small, tmp_path / "out", 2, "before")
    os.utime(small / "extra" / "a.txt", (1, 1))
    with pytest.raises(DestinationError, match="changed"):
        convert(small, tmp_path / "out", experts=3)


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "moescale.json", "deep/x"])
def test_something_else_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    """A destination that is not empty is not written to."""
    checkpoints.write_files(tmp_path / "out", {name: b"[]"})
    with pytest.raises(DestinationError, match=r"is not empty|holds another output"):
        convert(source, tmp_path / "out", experts=3)
    assert checkpoints.tree(tmp_path / "out") == {name: b"[]"}


def test_a_hostile_provenance_is_something_else(source: Path, tmp_path: Path) -> None:
    """A file that is nested too deep is not an output of moescale, and does not crash it."""
    checkpoints.write_files(tmp_path / "out", {"moescale.json": b"[" * 100_000})
    with pytest.raises(DestinationError, match="holds another output"):
        convert(source, tmp_path / "out", experts=3)


def test_overwrite_replaces_another_model(source: Path, tmp_path: Path) -> None:
    """Old files that the new output does not have are removed."""
    old = {
        "config.json": b"{}",
        "consolidated.safetensors": b"",
        "sub/x.bin": b"",
        ".git/HEAD": b"r",
    }
    checkpoints.write_files(tmp_path / "out", old)
    assert convert(source, tmp_path / "out", experts=3, overwrite=True).status == "replace"
    assert (tmp_path / "out" / ".git" / "HEAD").read_bytes() == b"r"
    (tmp_path / "out" / ".git" / "HEAD").unlink()
    check_weights(source, tmp_path / "out", factor_by_layer(UP))


def test_overwrite_does_not_replace_what_is_no_model(source: Path, tmp_path: Path) -> None:
    """A home folder is not a model."""
    checkpoints.write_files(tmp_path / "out", {"thesis.tex": b"years"})
    with pytest.raises(DestinationError, match="does not look like a model"):
        convert(source, tmp_path / "out", experts=3, overwrite=True)
    assert checkpoints.tree(tmp_path / "out") == {"thesis.tex": b"years"}


def test_a_younger_source_makes_the_output_stale(source: Path, tmp_path: Path) -> None:
    """If the source was written later, the output is neither finished nor overwritten."""
    convert(source, tmp_path / "out", experts=3)
    later = (tmp_path / "out" / "moescale.json").stat().st_mtime + 100
    os.utime(source / "model-00001-of-00003.safetensors", (later, later))
    with pytest.raises(DestinationError, match="younger"):
        convert(source, tmp_path / "out", experts=3)
    assert convert(source, tmp_path / "out", experts=3, verify=True).verified
    assert convert(source, tmp_path / "out", experts=3, overwrite=True).status == "replace"


@pytest.mark.parametrize("change", ["a new file", "another config"])
def test_a_source_with_other_files_makes_the_output_outdated(
    change: str, source: Path, tmp_path: Path
) -> None:
    """The options are equal, so they are not the difference; a verification names the file."""
    out = tmp_path / "out"
    convert(source, out, experts=3)
    name = {"a new file": "notes.txt", "another config": "config.json"}[change]
    config = (source / "config.json").read_bytes()
    (source / name).write_bytes(config.replace(b"1.0e-05", b"1.0e-06"))
    with pytest.raises(DestinationError, match="from other files than the source has now"):
        convert(source, out, experts=3)
    for prove in (partial(convert, verify=True), verify):
        with pytest.raises(VerificationError, match=name):
            prove(source, out, experts=3)
    assert convert(source, out, experts=3, verify=True, overwrite=True).verified
    assert convert(source, out, experts=3).status == "done"


def test_verification_without_options_needs_an_output(source: Path, tmp_path: Path) -> None:
    """A folder that is not an output has no options; the error says so."""
    for prove in (partial(convert, verify=True), verify):
        with pytest.raises(UsageError, match="does not record its options"):
            prove(source, tmp_path / "out")


def test_an_output_that_lost_a_file_is_not_done(source: Path, tmp_path: Path) -> None:
    """An output is finished only if all files exist with their sizes."""
    convert(source, tmp_path / "out", experts=3)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(DestinationError):
        convert(source, tmp_path / "out", experts=3)
    assert convert(source, tmp_path / "out", experts=3, overwrite=True).status == "replace"
    check_weights(source, tmp_path / "out", factor_by_layer(UP))


def test_an_output_whose_config_was_edited_is_not_done(source: Path, tmp_path: Path) -> None:
    """Small files are cheap to compare, so a changed number in the config is noticed."""
    convert(source, tmp_path / "out", experts=3)
    path = tmp_path / "out" / "config.json"
    path.write_bytes(path.read_bytes().replace(b"\t3 ,", b"\t4 ,"))
    with pytest.raises(DestinationError, match="changed since"):
        convert(source, tmp_path / "out", experts=3)
    with pytest.raises(VerificationError, match=r"config\.json: differs"):
        convert(source, tmp_path / "out", experts=3, verify=True)


def test_an_output_can_be_rescaled_again(source: Path, tmp_path: Path) -> None:
    """An output is a source like any other, with a warning."""
    convert(source, tmp_path / "one", experts=3)
    result = convert(tmp_path / "one", tmp_path / "two", experts=2)
    assert any("moescale" in warning for warning in result.plan.warnings)
    assert result.plan.factors["0"] == pytest.approx(DOWN)


@pytest.mark.parametrize("place", ["source", "source/out", "."])
def test_source_and_destination_must_be_apart(source: Path, tmp_path: Path, place: str) -> None:
    """Equal folders, nested folders and folders reached through a link are refused."""
    (tmp_path / "link").symlink_to(tmp_path)
    before = checkpoints.tree(source)
    for destination in (tmp_path / place, tmp_path / "link" / place):
        with pytest.raises(UsageError):
            convert(source, destination, experts=3)
        with pytest.raises(UsageError):
            plan(source, destination, experts=3)
    assert checkpoints.tree(source) == before


# Failures during a run ----------------------------------------------------------------------------


def overflowing(folder: Path) -> Path:
    """A Mixtral with two weights that overflow with a factor above 1."""
    tensors = checkpoints.mixtral_tensors()
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    dtype, shape, data = tensors[name]
    codes = np.frombuffer(data, "<u2").copy()
    codes[[10, 20]] = 0x7F7F, 0xFF7F
    tensors[name] = dtype, shape, codes.tobytes()
    checkpoints.write_shards(folder, tensors, 3)
    (folder / "config.json").write_text(checkpoints.MIXTRAL_CONFIG)
    return folder


def test_overflow_is_an_error_with_a_name(tmp_path: Path) -> None:
    """Overflow is never silent: the error names shard, tensor and count, and nothing loads."""
    source = overflowing(tmp_path / "source")
    with pytest.raises(RewriteError) as caught:
        convert(source, tmp_path / "out", experts=3)
    for part in ("model-00003-of-00003.safetensors", "layers.1.", "experts.2.w2", "2 values"):
        assert part in caught.value.message
    assert not (tmp_path / "out" / "config.json").exists()
    assert convert(source, tmp_path / "other", experts=1).status == "new"


def no_space(*_: Any) -> Any:
    """Fail like a full disk, without a file name."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_is_said_as_such(small: Path, tmp_path: Path, call: str) -> None:
    """The error names the file, and a rerun continues once there is space."""
    begin = LocalDestination.begin

    def then_full(self: LocalDestination, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        patch.setattr(os, call, no_space, raising=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalDestination, "begin", then_full)
        with pytest.raises(RewriteError, match="disk is full") as caught:
            convert(small, tmp_path / "out", experts=3, jobs=1)
    assert caught.value.hint
    assert convert(small, tmp_path / "out", experts=3).status == "resume"


def test_a_disk_that_is_full_at_the_end_is_said_as_such(small: Path, tmp_path: Path) -> None:
    """The small files at the end are written as carefully as the shards."""
    put = LocalDestination.write_small

    def full(self: LocalDestination, name: str, data: bytes) -> Any:
        return no_space() if name == "config.json" else put(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalDestination, "write_small", full)
        with pytest.raises(RewriteError, match=r"config\.json.*disk is full"):
            convert(small, tmp_path / "out", experts=3)
    assert convert(small, tmp_path / "out", experts=3).status == "resume"


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "extra/a.txt"])
def test_a_source_that_changes_during_the_run_is_noticed(
    small: Path, tmp_path: Path, name: str
) -> None:
    """A file that is written to after planning ends the run and is not in the output."""

    def change(_: Plan) -> None:
        (small / name).write_bytes((small / name).read_bytes()[::-1])
        os.utime(small / name, (1, 1))

    with pytest.raises(RewriteError, match="changed") as caught:
        convert(small, tmp_path / "out", experts=3, planned=change)
    assert not (tmp_path / "out" / "config.json").exists()
    assert "--overwrite if it has already written" in str(caught.value.hint)
    (small / name).write_bytes((small / name).read_bytes()[::-1])
    with pytest.raises(DestinationError, match="unfinished run of another source"):
        convert(small, tmp_path / "out", experts=3)
    assert convert(small, tmp_path / "out", experts=3, overwrite=True).status == "replace"


@pytest.mark.parametrize("name", ["README.md", "model.safetensors.index.json"])
def test_a_small_file_that_changes_after_the_plan_is_noticed(
    small: Path, tmp_path: Path, name: str
) -> None:
    """Card and index are read after planning, so they are checked like the shards."""

    def change(_: Plan) -> None:
        (small / name).write_bytes((small / name).read_bytes() + b" ")
        os.utime(small / name, (1, 1))

    with pytest.raises(RewriteError, match="changed"):
        convert(small, tmp_path / "out", experts=3, planned=change)


def test_an_error_in_one_shard_stops_the_others(small: Path, tmp_path: Path) -> None:
    """The reported error is the one that ended the run, not one of the stopped threads."""

    def fail(name: str, size: int) -> None:
        if name.startswith("model-00003"):
            raise RewriteError("the cause")

    with pytest.raises(RewriteError, match="the cause"):
        convert(small, tmp_path / "out", experts=3, jobs=4, progress=fail)
    assert (tmp_path / "out" / STATE / JOURNAL).exists()
    assert not list((tmp_path / "out" / STATE).glob("*.tmp"))


# From Python --------------------------------------------------------------------------------------

PUBLIC = """
import sys, moescale
source, output = sys.argv[1:]
for _ in range(2):
    assert moescale.plan(source, experts=3).factors
    assert moescale.convert(source, output, experts=3).plan
    assert moescale.verify(source, output, experts=3).verified
from moescale import Options, Plan, convert, plan, verify
assert callable(convert) and callable(plan) and callable(verify)
"""


def test_the_public_names_can_be_used_twice(small: Path, tmp_path: Path) -> None:
    """``moescale.plan``, ``convert`` and ``verify`` are functions, whatever was imported before."""
    command = [sys.executable, "-c", PUBLIC, small, tmp_path / "out"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_a_count_for_each_layer_is_done_and_proven_like_any_other(tmp_path: Path) -> None:
    """A config with a list of counts gives factors by layer, and its output is recognised."""
    source = checkpoints.qwen2(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["num_experts_per_tok"]
    config |= {"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2, 2, 1]}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out", experts=3, verify=True).verified
    assert convert(source, tmp_path / "out", experts=3).status == "done"
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["moe_topk"] == [3, 3, 3, 3]


@pytest.mark.parametrize(("shards", "jobs", "threads"), [(1, 8, {6}), (3, 8, {2}), (3, 2, {3})])
def test_fewer_shards_than_cores_use_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, jobs: int, threads: set[int]
) -> None:
    """The cores are divided among the shards that are rewritten at the same time."""
    given, used, rewrite, run = set[int](), set[int](), run_module.rewrite, Editors.run

    def counted(*arguments: Any) -> Any:
        given.add(arguments[-1])
        return rewrite(*arguments)

    def used_for(editors: Editors, calls: Any) -> Any:
        used.add(editors.ahead)
        return run(editors, calls)

    monkeypatch.setattr(executor, "cores", lambda: 6)
    monkeypatch.setattr(Editors, "run", used_for)
    monkeypatch.setattr(checkpoint_rewrite, "EDIT_PIECE", 8)  # the tensors are small
    monkeypatch.setattr(run_module, "rewrite", counted)
    source = checkpoints.mixtral(tmp_path / "source", shards=shards)
    convert(source, tmp_path / "out", experts=3, jobs=jobs)
    assert given == used == threads
    check_weights(source, tmp_path / "out", factor_by_layer(UP))
