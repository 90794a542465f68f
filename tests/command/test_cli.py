"""The command: what goes to stdout and to stderr, exit codes, and errors of one or two lines."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints, environment
from support import quantised_checkpoints as quantised
from support.command import Command, Done
from typer.main import get_command

from moescale import api
from moescale.cli import app
from moescale.families import architectures, llama_cpp
from moescale.version import __version__

pytestmark = pytest.mark.usefixtures("offline")

BOXES = "╭╮╰╯│─┌┐└┘"


def shell(*arguments: object, **options: Any) -> Done:
    """Runs the command as a user does, in a separate process."""
    command = [sys.executable, "-m", "moescale", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    return Done(result.returncode, result.stdout, result.stderr)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete small Mixtral repo."""
    return checkpoints.mixtral(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The destination."""
    return tmp_path / "out"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def fails(done: Done, code: int, *words: str) -> None:
    """Assert an expected error: exit code, nothing on stdout, one or two lines with these parts."""
    assert done.code == code, done
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(lines) <= 2, done.err
    assert lines[0].startswith("moescale: ")
    assert "Traceback" not in done.err
    assert not set(BOXES) & set(done.err)
    for word in words:
        assert word in done.err


# Streams ------------------------------------------------------------------------------------------


def test_a_run_prints_the_destination_and_talks_on_stderr(source: Path, out: Path) -> None:
    """Stdout is data: the output's location; plan and summary go to stderr."""
    done = shell(source, out, "--experts", 3)
    assert (done.code, done.out) == (0, f"{out}\n")
    for part in ("preserve", "1.22474", "published", "0.816497", "2 -> 3", "8 tensors scaled"):
        assert part in done.err
    assert not set(BOXES) & set(done.err)
    assert "\x1b" not in done.err


def test_quiet_prints_the_destination_only(moescale: Command, source: Path, out: Path) -> None:
    """-q leaves stderr to warnings and errors."""
    assert moescale(source, out, "-k", 3, "-q") == Done(0, f"{out}\n", "")
    assert moescale(source, out, "-k", 3, "-q", "--dry-run") == Done(0, f"{out}\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="only there any bytes can be a name")
def test_a_destination_whose_name_is_no_text(source: Path, tmp_path: Path) -> None:
    """Stdout has the name's bytes as given; stderr has them escaped."""
    out = os.fsencode(tmp_path) + b"/\xff"
    command = [sys.executable, "-m", "moescale", os.fsencode(source), out, b"-k", b"3"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, out + b"\n")
    assert b"udcff" in done.stderr and b"\xff" not in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    moescale: Command, source: Path, tmp_path: Path
) -> None:
    """A dry run's data is the plan; DST is optional."""
    before = checkpoints.tree(tmp_path)
    for more in ((), (tmp_path / "out",)):
        done = moescale(source, *more, "-k", 3, "--dry-run")
        assert (done.code, done.err) == (0, "")
        assert "2 -> 3" in done.out
    assert checkpoints.tree(tmp_path) == before


def test_warnings_are_on_stderr_whatever_is_asked_for(
    moescale: Command, source: Path, out: Path
) -> None:
    """-q and --json still show warnings, but not on stdout."""
    (source / "moescale.json").write_bytes(b"{}")
    for more in (["-q"], ["--json"], ["--dry-run"], ["--dry-run", "--json"]):
        done = moescale(source, out, "-k", 3, *more)
        assert done.code == 0
        assert "warning: " in done.err
        assert "warning: " not in done.out


def test_warnings_and_errors_stand_out_on_a_terminal(
    source: Path, out: Path, moescale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first word is coloured; output for programs never is."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR")
    (source / "moescale.json").write_bytes(b"{}")
    assert "\x1b" not in moescale(source, "-k", 3, "--dry-run").err
    monkeypatch.setattr("moescale.report.colour.shows_colour", lambda stream: stream is sys.stderr)
    done = moescale(source, "-k", 3, "--dry-run", "--json")
    assert done.err.startswith("\x1b[1;33mwarning:\x1b[0m the source is itself an output")
    assert "\x1b" not in done.out
    assert moescale(source, out).err.startswith("\x1b[1;31mmoescale:\x1b[0m --experts is missing")


def test_a_destination_that_looks_like_a_repo_is_said_to_be_a_folder(
    source: Path, tmp_path: Path, moescale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning comes before any writing and shows the Hub syntax; not for an existing folder."""
    monkeypatch.chdir(tmp_path)
    said = "warning: me/out is a local folder, not a repo; to upload, give hf://me/out\n"
    for more in (["--dry-run"], ["-q", "--dry-run"], ["--json", "--dry-run"], ["-q"]):
        assert moescale(source, "me/out", "-k", 3, *more).err == said
    assert "me/out (local)" in moescale(source, "me/out", "-k", 3, "--dry-run").out
    for place in ("me/other", "./us/out", "a/b/c", "out"):
        assert moescale(source, place, "-k", 3, "-q").err == ""


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_what_is_found_while_writing_is_a_warning(
    moescale: Command, out: Path, tmp_path: Path, option: str
) -> None:
    """Scales that are all zero are noticed when they are read, and named on stderr."""
    case = next(case for case in quantised.EXACT if case.id == "tensor FP8, static")
    tensors = quantised.tensors(case)
    scale = f"{quantised.modules(case)[0]}.weight_scale"
    tensors[scale] = quantised.raw("F32", [0.0])
    checkpoints.write_shards(tmp_path / "zeros", tensors, 1)
    (tmp_path / "zeros/config.json").write_text(json.dumps(quantised.config(case)))
    done = moescale(tmp_path / "zeros", out, "--factor", "2", option)
    assert done.code == 0
    assert f"warning: {scale}: every scale in it is 0" in done.err
    if option == "--json":
        assert scale in json.loads(done.out)["result"]["warnings"][0]


def test_verbose_lists_every_tensor_and_file(moescale: Command, source: Path) -> None:
    """-v lists names that the short plan only counts."""
    short = moescale(source, "-k", 3, "--dry-run").out
    long = moescale(source, "-k", 3, "--dry-run", "-v").out
    for name in ("layers.1.block_sparse_moe.experts.3.w2.weight", "tokenizer.json"):
        assert name not in short
        assert name in long


def test_the_closing_summary_says_what_to_do_next(
    moescale: Command, source: Path, out: Path
) -> None:
    """An unverified run shows how to verify; a verified one says so last, after what to run."""
    assert "--verify" in moescale(source, out, "-k", 3).err.splitlines()[-1]
    proved = moescale(source, out, "-k", 3, "--verify").err
    assert proved.splitlines()[-1].startswith("Verified in ")
    assert f"vllm serve {out}\n" in proved
    assert "already done" in moescale(source, out, "-k", 3).err.splitlines()[-2]


# JSON ---------------------------------------------------------------------------------------------

NUMBER = (int, float)
SHAPE: dict[str, Any] = {
    "source": {"kind": str, "id": str, "revision": (str, type(None))},
    "destination": (str, type(None)),
    "model_type": str,
    "experts": {"trained": int, "from": int, "to": int, "total": int},
    "router": {"renormalised": bool},
    "rule": str,
    "rho": float,
    "factors": dict,
    "alternatives": {"preserve": float, "published": float},
    "predicted_norm": {"none": float, "preserve": float, "published": float},
    "tensors": list,
    "files": list,
    "bytes": {"read": int, "changed": int, "written": int},
}


def has_shape(value: Any, shape: Any) -> None:
    """Assert that a value has at least these keys, of these types."""
    if isinstance(shape, dict):
        for key, inner in shape.items():
            has_shape(value[key], inner)
    else:
        assert isinstance(value, shape), value


def test_the_json_of_a_plan(moescale: Command, source: Path) -> None:
    """The JSON is one object, as in the contract."""
    done = moescale(source, "-k", 3, "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    plan = json.loads(done.out)
    has_shape(plan, SHAPE)
    assert plan["source"] == {"kind": "local", "id": str(source), "revision": None}
    assert plan["destination"] is None
    assert plan["experts"] == {"trained": 2, "from": 2, "to": 3, "total": 4}
    assert plan["router"]["renormalised"] is True
    assert plan["rule"] == "preserve"
    assert plan["factors"] == {"0": pytest.approx(1.5**0.5), "1": pytest.approx(1.5**0.5)}
    assert plan["alternatives"]["published"] == 0.816496580927726
    assert plan["predicted_norm"]["none"] == pytest.approx((2 / 3) ** 0.5)
    assert plan["predicted_norm"]["published"] == pytest.approx(2 / 3)


def test_the_tensors_of_the_json(moescale: Command, source: Path) -> None:
    """Each planned tensor has its shard, dtype, shape, role, layer and factor."""
    plan = json.loads(moescale(source, "-k", 3, "--dry-run", "--json").out)
    assert len(plan["tensors"]) == 8
    first = plan["tensors"][0]
    expected = {
        "name": "model.layers.0.block_sparse_moe.experts.0.w2.weight",
        "shard": "model-00001-of-00003.safetensors",
        "dtype": "BF16",
        "shape": [8, 6],
        "role": "weight",
        "layer": 0,
        "factor": plan["factors"]["0"],
    }
    assert {key: first[key] for key in expected} == expected


def test_the_files_of_the_json(moescale: Command, source: Path) -> None:
    """Each file has its size, its action and the reason; the bytes add up."""
    checkpoints.write_files(source, checkpoints.LEFT_OUT)
    plan = json.loads(moescale(source, "-k", 3, "--dry-run", "--json").out)
    files = {file["name"]: file for file in plan["files"]}
    assert files["tokenizer.json"] == {
        "name": "tokenizer.json",
        "size": 18,
        "action": "copy",
        "why": None,
    }
    assert files["tiny.gguf"]["action"] == "skip"
    assert files["tiny.gguf"]["why"]
    assert {file["action"] for file in files.values()} == {
        "rewrite",
        "copy",
        "edit",
        "create",
        "skip",
    }
    assert plan["bytes"]["changed"] == 8 * 8 * 6 * 2
    read = sum(f["size"] for f in files.values() if f["size"] and f["action"] != "skip")
    assert plan["bytes"]["read"] == read


def test_a_run_with_json_prints_one_object(source: Path, out: Path) -> None:
    """The object is the plan with the result, and there is no other output."""
    done = shell(source, out, "-k", 3, "--json", "--verify")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    has_shape(result, SHAPE)
    assert result["destination"] == str(out)
    assert result["result"]["verified"] is True


@pytest.mark.parametrize("options", [["-k", 3, "--rho", "0.5"], ["--factor", "0.5"], ["-k", 4]])
def test_json_has_no_numbers_that_are_none(
    moescale: Command, source: Path, options: list[Any]
) -> None:
    """No NaN and no Infinity: any JSON reader accepts the output."""
    done = moescale(source, *options, "--dry-run", "--json")
    json.loads(done.out, parse_constant=pytest.fail)


def test_factors_of_stacks_carry_their_names(moescale: Command, tmp_path: Path) -> None:
    """MTP blocks with their own prefix are layers of a separate stack."""
    raw = checkpoints.qwen2_tensors(layers=4)
    raw = {n.replace("model.layers.3.", "mtp.layers.0."): value for n, value in raw.items()}
    checkpoints.write_shards(tmp_path / "m", raw, 1)
    (tmp_path / "m" / "config.json").write_text(json.dumps(checkpoints.QWEN2_CONFIG))
    plan = json.loads(moescale(tmp_path / "m", "-k", 3, "--dry-run", "--json").out)
    assert set(plan["factors"]) == {"1", "2", "mtp.0"}
    assert {t["layer"] for t in plan["tensors"]} == {1, 2, "mtp.0"}


# Invalid values: 2 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["-k", "0"], "--experts"),
        (["-k", "-1"], "--experts"),
        (["-n", "0", "-k", "3"], "--trained-experts"),
        (["-k", "3", "--rho", "2"], "--rho"),
        (["-k", "3", "--rho", "nan"], "--rho"),
        (["-k", "3", "--rule", "best"], "--rule"),
        (["-k", "3", "--calibrate", "a.txt"], "--calibrate"),
        (["-k", "3", "--rule", "fitted", "--device", "tpu"], "--device"),
        (["-k", "3", "--fold", "nowhere"], "--fold"),
        (["--gate-scale", "0"], "--gate-scale"),
        (["-k", "3", "--gate-scale", "2", "--fold", "config"], "--fold config"),
        (["--factor", "0"], "factor"),
        (["--factor", "-1"], "factor"),
        (["--factor", "nan"], "factor"),
        (["--factor", "inf"], "factor"),
        (["--factor", "1e39"], "factor"),
        (["--factor", "2", "--rule", "none"], "exclude"),
        (["-k", "3", "--pattern", ".*"], "--experts-key"),
        ([], "--experts is missing"),
    ],
)
def test_usage_errors(
    moescale: Command, source: Path, out: Path, options: list[str], word: str
) -> None:
    """A value that is invalid for every source gives 2 before the source is read."""
    fails(moescale(source, out, *options), 2, word)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["-k", "x"], "--experts is 'x': it must be a whole number"),
        (["--experts=4,x"], "--experts is '4,x': it must be a whole number"),
        (["-kx"], "--experts is 'x': it must be a whole number"),
        (["-k3", "-n2.0"], "--trained-experts is '2.0': it must be a whole number"),
        (["--experts=4,6"], "Add --dry-run, or give only one of them"),
        (["--factor", "abc"], "--factor is 'abc': it must be a number, such as 1.2"),
        (["--lits"], "No such option: --lits"),
        (["--list"], "--list-types"),
        (["--expert", "3"], "--experts"),
        (["-k", "2.5"], "--experts"),
        (["-k", "3", "--rho", "much"], "--rho"),
        (["-k", "3", "-j", "0"], "--jobs"),
        (["-k", "3", "--no-such-option"], "--no-such-option"),
        (["-k", "3", "a", "b"], "a b"),
        (["-k"], "-k"),
    ],
)
def test_usage_errors_of_the_command_line(
    moescale: Command, source: Path, out: Path, options: list[str], word: str
) -> None:
    """The parser's errors are like all others: 2, in one or two lines."""
    fails(moescale(source, out, *options), 2, word)


def test_a_missing_destination(moescale: Command, source: Path) -> None:
    """Without --dry-run a destination is required."""
    fails(moescale(source, "-k", 3), 2, "DST is missing")
    fails(moescale(source), 2, "DST and --experts are missing", f"moescale {source} DST -k M")


def test_an_output_is_shown_by_a_dry_run(moescale: Command, source: Path, out: Path) -> None:
    """Without -k an output is shown; for a model, the error asks for the number."""
    fails(moescale(source, "--dry-run"), 2, "--experts is missing", f"{source} -k M --dry-run")
    assert moescale(source, out, "-k", 3).code == 0
    done = moescale(out, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "2 -> 3" in done.out and "unchanged since they were written" in done.out
    (out / "LICENSE").unlink()
    done = moescale(out, "--dry-run", "--json")
    assert done.err == "warning: LICENSE: is missing\n"
    assert json.loads(done.out)["files"]["differ"] == {"LICENSE": "is missing"}
    assert moescale(out, "--dry-run", "-q").out == ""
    assert "2 -> 4" not in moescale(out, "--dry-run").out
    assert "is itself an output" in moescale(out, "-k", 4, "--dry-run").err


def test_there_are_no_subcommands(moescale: Command, source: Path, out: Path) -> None:
    """Typing one gives an error with the line to use, and that line works."""
    for words in (
        ["help"],
        ["help", "convert"],
        ["list"],
        ["plan", source, "-k", 3],
        ["convert", source, out, "-k", 3],
        ["-q", "plan", source, "-k", 3],
        ["verify", source, out],
    ):
        done = moescale(*words)
        verb = next(str(word) for word in words if not str(word).startswith("-"))
        fails(done, 2, f"{verb}: there are no subcommands", "\nTry: moescale ")
        line = done.err.splitlines()[1].removeprefix("Try: moescale ")
        assert moescale(*shlex.split(line)).code == 0, line
    assert out.exists()
    fails(moescale("convert"), 2, "no subcommands", "moescale SRC DST -k M, or moescale --help")


def test_a_source_may_be_called_like_a_subcommand(
    moescale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An existing folder is a source, whatever its name."""
    checkpoints.mixtral(tmp_path / "plan")
    monkeypatch.chdir(tmp_path)
    assert moescale("plan", "out", "-k", 3).code == 0


def test_a_missing_source(moescale: Command) -> None:
    """One line shows what is required."""
    fails(moescale("-k", 3), 2, "SRC is missing", "moescale SRC DST -k M")


@pytest.mark.parametrize("place", ["source", "source/out", "source/../source", "."])
def test_a_destination_that_is_the_source(
    moescale: Command, source: Path, tmp_path: Path, place: str
) -> None:
    """The same folder, or one inside the other, gives 2, even in a dry run."""
    before = checkpoints.tree(tmp_path)
    fails(moescale(source, tmp_path / place, "-k", 3), 2, "source and destination")
    fails(moescale(source, tmp_path / place, "-k", 3, "--overwrite"), 2)
    fails(moescale(source, tmp_path / place, "-k", 3, "--dry-run"), 2)
    assert checkpoints.tree(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"0": 1.2}', '{"0": 1.2, "1": "x"}', '{"0": 1, "1": 0}', "[" * 99_999],
    ids=range(7),
)
def test_factors_that_do_not_fit(
    moescale: Command, source: Path, out: Path, tmp_path: Path, content: str
) -> None:
    """Invalid JSON, a missing layer, a value that is not a factor: all give 2."""
    (tmp_path / "f.json").write_text(content)
    fails(moescale(source, out, "--factors", tmp_path / "f.json"), 2)
    assert not out.exists()


def test_a_missing_factors_file(moescale: Command, source: Path, out: Path, tmp_path: Path) -> None:
    """The error names the file."""
    fails(moescale(source, out, "--factors", tmp_path / "none.json"), 2, "none.json")


STDIN = Path("/dev/stdin")


@pytest.mark.skipif(not STDIN.exists(), reason="this system has no /dev/stdin")
@pytest.mark.parametrize("more", [["--dry-run"], [], ["--verify"], ["--dry-run", "-k", "4"]])
def test_factors_may_come_from_a_pipe(source: Path, out: Path, more: list[str]) -> None:
    """They are read once: ``--factors <(jq ...)``, also for several numbers of experts."""
    destination = [] if "4" in more else [out]
    options = {"input": '{"factors": {"0": 1.25, "1": 1.5}}'}
    done = shell(source, *destination, "-k", 3, "--factors", STDIN, *more, **options)
    assert done.code == 0, done.err
    assert out.exists() == ("--dry-run" not in more)


def test_the_factors_of_an_earlier_output(moescale: Command, source: Path, tmp_path: Path) -> None:
    """``moescale.json`` is accepted without changes."""
    assert moescale(source, tmp_path / "one", "-k", 3).code == 0
    done = moescale(source, tmp_path / "two", "--factors", tmp_path / "one" / "moescale.json")
    assert done.code == 0
    for name in checkpoints.tree(tmp_path / "one"):
        if name.endswith(".safetensors"):
            one, two = tmp_path / "one" / name, tmp_path / "two" / name
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "destination", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf:a/b", "hf:/a/b"]
)
def test_a_place_on_the_hub_that_is_none(
    moescale: Command, source: Path, tmp_path: Path, destination: str, monkeypatch: Any
) -> None:
    """A misspelt Hub location never becomes a local folder of that name."""
    monkeypatch.chdir(tmp_path)
    fails(moescale(source, destination, "-k", 3), 2, "hf://")
    assert not list(tmp_path.glob("hf*"))


def test_a_source_on_the_hub_that_is_misspelt(moescale: Command, out: Path) -> None:
    """The error shows the syntax of a repo and its revision."""
    fails(moescale("hf:lab/source", out, "-k", 3), 2, "hf://org/name")
    fails(moescale("hf:/lab/source", "-k", 3, "--dry-run"), 2, "hf://org/name")
    fails(moescale("source", out, "-k", 3), 3, "does not exist", "hf://org/name@rev")


# Values that this source does not allow: 3 --------------------------------------------------------


@pytest.mark.parametrize("count", [5, 1000])
def test_more_experts_than_there_are(
    moescale: Command, source: Path, out: Path, count: int
) -> None:
    """The error gives the range."""
    fails(moescale(source, out, "-k", count), 3, f"--experts is {count}", "1 to 4")
    fails(moescale(source, out, "-k", 2, "-n", count), 3, "--trained-experts", "1 to 4")
    assert not out.exists()


def test_the_limit_of_groups(moescale: Command, tmp_path: Path, out: Path) -> None:
    """A group-limited router cannot choose more experts than its groups contain."""
    source = checkpoints.deepseek(tmp_path / "source", n_group=2, topk_group=1)
    fails(moescale(source, out, "-k", 3), 3, "group", "1 to 2")
    assert moescale(source, out, "-k", 1).code == 0


def test_a_path_that_is_nearly_right(moescale: Command, source: Path, out: Path) -> None:
    """The error names the folder that is meant, or the one that contains the file."""
    for wrong in ("Source", "sourc", "source2"):
        slip = source.with_name(wrong)
        fails(moescale(slip, out, "-k", 3), 3, "does not exist", f"(did you mean {source}?)")
    file = source / "config.json"
    fails(moescale(file, out, "-k", 3), 3, "a file of a checkpoint", f"moescale {source} DST")


def test_a_link_to_nowhere(moescale: Command, source: Path, tmp_path: Path) -> None:
    """The error names the link's target, for a source and for a destination."""
    (tmp_path / "link").symlink_to("nowhere")
    word = "is a link to nowhere, which does not exist"
    fails(moescale(tmp_path / "link", tmp_path / "o", "-k", 3), 3, word)
    fails(moescale(source, tmp_path / "link", "-k", 3), 3, word)
    trial = moescale(source, tmp_path / "link", "-k", 3, "--dry-run")
    assert trial.code == 0 and "warning: a run would be refused" in trial.err and word in trial.err


def test_the_home_is_expanded(
    moescale: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``~`` is expanded in locations and file names, in the command and the API."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert moescale("~/source", "~/out", "-k", 3, "-q").out == f"{tmp_path / 'out'}\n"
    options = ("--factors", "~/out/moescale.json", "--report", "~/page.html")
    assert moescale("~/source", "~/two", *options).code == 0
    assert (tmp_path / "page.html").exists()
    assert api.verify("~/source", "~/two").verified
    assert api.plan(Path("~/source"), "~/three", experts=3).destination == str(tmp_path / "three")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("place", ["missing", "source/config.json"])
def test_a_source_that_is_no_directory(
    moescale: Command, source: Path, out: Path, place: str
) -> None:
    """A missing path and a file are unusable sources."""
    fails(moescale(source.parent / place, out, "-k", 3), 3, place)


def test_a_source_without_a_config(moescale: Command, source: Path, out: Path) -> None:
    """A folder with only weights is not a model."""
    (source / "config.json").unlink()
    fails(moescale(source, out, "-k", 3), 3, "config.json")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b"[" * 100_000, "nested"),
        ("model.safetensors.index.json", b"{}", "weight_map"),
        ("model-00002-of-00003.safetensors", b"", "too few"),
        ("model-00002-of-00003.safetensors", b"\xff" * 100, "claims"),
        ("model-00002-of-00003.safetensors", b"\x02" + b"\0" * 7 + b"{}", "does not hold it"),
    ],
)
def test_a_broken_file(
    moescale: Command, source: Path, out: Path, name: str, content: bytes, word: str
) -> None:
    """The error names the file and the fault, before anything is written."""
    (source / name).write_bytes(content)
    fails(moescale(source, out, "-k", 3), 3, name, word)
    assert not out.exists()


EDITED = {
    "a byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark", "Save it as UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16", "Save it as UTF-8"),
    "UTF-16 without a mark": ("{}".encode("utf-16-le"), "UTF-16", "Save it as UTF-8"),
    "another alphabet": ('{"a":\n "\u00e8"}'.encode("cp1252"), "line 2, column 3", "0xe8"),
    "a comma": (b'{"a": 1,\n}', "line ", "a comma before the closing bracket"),
    "a comma in a list": (b'{"a": [1,\n]}', "line ", "a comma before the closing bracket"),
    "a comment": (b'{\n  // edited\n "a": 1}', "line 2, column 3", "a comment"),
    "a comment at an end": (b'{"a": 1 # edited\n}', "line 1, column 9", "a comment"),
    "single quotes": (b"{'a': 1}", "line 1, column 2", "single quotes"),
    "Python's words": (b'{"a": True}', "line 1, column 7", "true, false"),
    "no value": (b'{"a": , "b": 1}', "line 1, column 7", "a value is missing"),
    "no comma": (b'{"a": 1\n"b": 1}', "line 2, column 1", "a comma is missing"),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("edit", EDITED)
def test_a_file_that_an_editor_broke(
    moescale: Command, source: Path, out: Path, name: str, edit: str
) -> None:
    """The error gives line and column, or how to save the file; a new download is not suggested."""
    content, *words = EDITED[edit]
    (source / name).write_bytes(content)
    done = moescale(source, out, "-k", 3)
    fails(done, 3, f"{name}: is not valid JSON: ", *words)
    assert "fetch" not in done.err
    assert "damaged" not in done.err


def test_a_file_that_is_cut_off(moescale: Command, source: Path, out: Path) -> None:
    """A new download is only suggested for a file that is cut off."""
    for name in ("config.json", "model-00002-of-00003.safetensors"):
        whole = (source / name).read_bytes()
        (source / name).write_bytes(whole[: len(whole) // 2])
        fails(moescale(source, out, "-k", 3), 3, name, "fetch it again")
        (source / name).write_bytes(whole)


def test_an_index_that_leads_out_of_the_repo(moescale: Command, source: Path, out: Path) -> None:
    """A shard name with dots never reaches the file system."""
    index = {"weight_map": {"a": "../../etc/shadow"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(moescale(source, out, "-k", 3), 3, "not a plain path")


def test_a_missing_shard(moescale: Command, source: Path, out: Path) -> None:
    """The error names the shard that the index lists."""
    (source / "model-00003-of-00003.safetensors").unlink()
    fails(moescale(source, out, "-k", 3), 3, "model-00003-of-00003.safetensors")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_file_that_cannot_be_read(
    moescale: Command, source: Path, out: Path, monkeypatch: Any, flags: list[str]
) -> None:
    """A file without read permission makes the source unusable: 3, and the error names the file."""
    name = "model-00002-of-00003.safetensors"

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    real = open
    monkeypatch.setattr("moescale.storage.local.source.open", refuse, raising=False)
    fails(moescale(source, out, "-k", 3, *flags), 3, name, "Permission denied")


def test_an_unknown_model_type_names_the_closest(
    moescale: Command, source: Path, out: Path
) -> None:
    """For a misspelt or new type the error lists similar ones; --arch accepts them."""
    edit_config(source, model_type="mixtrale")
    fails(moescale(source, out, "-k", 3), 3, "'mixtrale'", "mixtral", "--arch")
    assert moescale(source, out, "-k", 3, "--arch", "mixtral").code == 0


def test_an_unknown_model_type_that_is_like_none(
    moescale: Command, source: Path, out: Path
) -> None:
    """The error shows tensors that look routed, and how to name them."""
    edit_config(source, model_type="xyzzy123")
    failed = moescale(source, out, "-k", 3)
    fails(failed, 3, "'xyzzy123'", "--pattern", "experts.0.w2", "--factor or --rule published")
    assert "have the names of mixtral (and of " in failed.err
    assert moescale(source, "-k", 3, "--dry-run", "--arch", "mixtral").code == 0
    words = shlex.split(failed.err.partition(": try ")[2].partition(" with ")[0])
    assert words[::2] == ["--pattern", "--experts-key"]
    assert moescale(source, out, "-k", 3, *words, "--factor", 1.2).code == 0
    edit_config(source, norm_topk_prob=True)
    failed = moescale(source, "-k", 3, "--dry-run")
    words = shlex.split(failed.err.partition(": try ")[2].rstrip(".\n"))
    assert moescale(source, "-k", 4, "--dry-run", *words).code == 0


def test_an_unknown_model_type_with_names_of_its_own(moescale: Command, tmp_path: Path) -> None:
    """The error suggests the command in the README's recipe."""
    folder = tmp_path / "new"
    names = [
        f"model.layers.0.moe.{e}.{suffix}.weight" for e in range(4) for suffix in ("out", "gate")
    ]
    checkpoints.write_shards(folder, {n: checkpoints.values("BF16", (2, 2)) for n in names}, 1)
    config = {"model_type": "xyzzy", "top_k": 2, "num_experts": 4}
    (folder / "config.json").write_text(json.dumps(config))
    pattern = r"--pattern 'model\.layers\.\d+\.moe\.\d+\.out\.weight' --experts-key top_k"
    fails(moescale(folder, "-k", 3, "--dry-run"), 3, pattern)
    words = [*shlex.split(pattern), "--factor", 1.1]
    assert moescale(folder, "-k", 3, "--dry-run", *words).code == 0


@pytest.mark.parametrize("arch", ["llama", "Mixtral"])
def test_an_arch_that_is_not_known(moescale: Command, source: Path, out: Path, arch: str) -> None:
    """--arch accepts the types in the table."""
    fails(moescale(source, out, "-k", 3, "--arch", arch), 3, "not known")


def test_a_part_that_is_none(moescale: Command, source: Path, out: Path) -> None:
    """A model with one MoE has no parts."""
    fails(moescale(source, out, "-k", 3, "--part", "talker"), 3, "talker")


def test_a_missing_count(moescale: Command, source: Path, out: Path) -> None:
    """The error names the missing key."""
    edit_config(source, num_experts_per_tok=None)
    fails(moescale(source, out, "-k", 3), 3, "num_experts_per_tok")


@pytest.mark.parametrize("value", [0, -1, "2", 2.5, True])
def test_a_count_that_is_none(moescale: Command, source: Path, out: Path, value: Any) -> None:
    """The error names the key whose value is not a number of experts."""
    edit_config(source, num_experts_per_tok=value)
    fails(moescale(source, out, "-k", 3), 3, "num_experts_per_tok")


def test_a_missing_expert(moescale: Command, tmp_path: Path, out: Path) -> None:
    """An incomplete checkpoint is refused."""
    raw = checkpoints.mixtral_tensors()
    del raw["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    checkpoints.write_shards(tmp_path / "m", raw, 2)
    (tmp_path / "m" / "config.json").write_text(checkpoints.MIXTRAL_CONFIG)
    fails(moescale(tmp_path / "m", out, "-k", 3), 3, "layer 1", "expert 2")


def test_a_pattern_names_the_projections(moescale: Command, tmp_path: Path, out: Path) -> None:
    """An unknown architecture is rescaled by its tensor names and its config key."""
    raw = {
        name.replace("block_sparse_moe", "moe"): value
        for name, value in checkpoints.mixtral_tensors().items()
    }
    source = tmp_path / "m"
    checkpoints.write_shards(source, raw, 1)
    config = {"model_type": "new", "top": 2, "num_experts": 4, "num_hidden_layers": 2}
    (source / "config.json").write_text(json.dumps(config))
    pattern = r"model\.layers\.\d+\.moe\.experts\.\d+\.w2\.weight"
    known = ["--pattern", pattern, "--experts-key", "top"]
    assert moescale(source, out, "-k", 3, "--factor", 1.5, *known).code == 0
    assert json.loads((out / "config.json").read_bytes())["top"] == 3
    assert moescale(source, out, "--verify", "-k", 3, "--factor", 1.5, *known).code == 0
    fails(moescale(source, tmp_path / "x", "-k", 3, *known), 3, "router", "--factor")
    wrong = [known[0], pattern.replace("w2", "w9"), *known[2:]]
    fails(moescale(source, tmp_path / "x", "-k", 3, "--factor", 1.5, *wrong), 3, "w9")


# Existing destinations: 3 -------------------------------------------------------------------------


def test_a_destination_with_other_content(moescale: Command, source: Path, out: Path) -> None:
    """The folder stays; --overwrite is only suggested for models, since it only replaces those."""
    checkpoints.write_files(out, {"config.json": b"{}", "model.safetensors": b"mine"})
    fails(moescale(source, out, "-k", 3, "-q"), 3, str(out), "--overwrite")
    shutil.rmtree(out)
    checkpoints.write_files(out, {"notes.txt": b"mine"})
    refused = moescale(source, out, "-k", 3, "-q")
    fails(refused, 3, str(out), "is not empty (notes.txt)", "empty this one")
    assert "--overwrite" not in refused.err
    fails(moescale(source, out, "-k", 3, "-q", "--overwrite"), 3, "does not look like a model")
    assert checkpoints.tree(out) == {"notes.txt": b"mine"}


def test_overwrite_replaces_another_output(moescale: Command, source: Path, out: Path) -> None:
    """An output of other options is refused, and replaced on request."""
    assert moescale(source, out, "-k", 4).code == 0
    fails(moescale(source, out, "-k", 3, "-q"), 3, "4 experts per token", "--overwrite")
    assert moescale(source, out, "-k", 3, "--overwrite", "--verify").code == 0


def test_a_destination_that_is_a_file(moescale: Command, source: Path, out: Path) -> None:
    """A file of that name stays."""
    out.write_bytes(b"mine")
    fails(moescale(source, out, "-k", 3, "-q"), 3, "not a directory")
    assert out.read_bytes() == b"mine"


def test_a_done_run_is_done(moescale: Command, source: Path, out: Path) -> None:
    """The same command again gives 0 and writes nothing."""
    assert moescale(source, out, "-k", 3).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert moescale(source, out, "-k", 3, "-q") == Done(0, f"{out}\n", "")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


# During a run: 1, 4, 130 --------------------------------------------------------------------------


def test_overflow(moescale: Command, source: Path, out: Path) -> None:
    """A value too large for its dtype gives 1; the error names the tensor, and nothing loads."""
    path = source / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    spans = checkpoints.spans(bytes(data))
    name = checkpoints.routed(spans)[0]
    start = spans[name][1]
    data[start : start + 2] = np.array([0x7F7F], "<u2").tobytes()
    path.write_bytes(data)
    fails(moescale(source, out, "-k", 3, "-q"), 1, path.name, name, "1 value")
    assert not (out / "config.json").exists()


def test_a_difference(moescale: Command, source: Path, out: Path) -> None:
    """A byte that differs from the plan gives 4, with file, tensor and offset."""
    assert moescale(source, out, "-k", 3).code == 0
    path = out / "model-00003-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    spans = checkpoints.spans(bytes(data))
    name = checkpoints.routed(spans)[0]
    data[spans[name][1] + 20] ^= 1
    path.write_bytes(data)
    done = moescale(source, out, "-k", 3, "--verify", "-q")
    fails(done, 4, path.name, name, f"byte {spans[name][1] + 20}")


def test_a_full_disk_says_which_file(
    moescale: Command, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system error without a file name does not become ``None``."""
    from moescale.storage.local.destination import LocalDestination

    def full(self: Any, name: str, data: bytes) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalDestination, "write_small", full)
    done = moescale(source, out, "-k", 3, "-q")
    fails(done, 1, "README.md")
    assert "None" not in done.err


SLOW = """
import sys, time
from pathlib import Path
from support import signals
from moescale.storage.local import writer as local_writer
write, marker, told = local_writer.LocalWriter.write, Path(sys.argv[1]), signals.told()
def slow(self, data):
    write(self, data)
    marker.write_bytes(b"")
    told.wait(100)
    time.sleep(0.1)
local_writer.LocalWriter.write = slow
sys.argv[:2] = ["moescale"]
from moescale.cli import main
main()
"""


def slow(code: str, marker: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a command that waits for a signal, and wait until it does."""
    command = [sys.executable, "-c", code, marker, *map(str, arguments)]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment())
    while not marker.exists() and child.poll() is None:
        time.sleep(0.01)
    return child


INTERRUPTED_IMPORT = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("moescale", run_name="__main__")
"""


def test_an_interrupted_start() -> None:
    """Ctrl-C during imports gives one line too."""
    command = [sys.executable, "-c", INTERRUPTED_IMPORT]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    fails(Done(child.returncode, child.stdout, child.stderr), 130, "interrupted")


def test_an_interruption_that_typer_answered(
    moescale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During option parsing, Typer turns Ctrl-C into a bare exit code; a line is added."""
    monkeypatch.setattr("moescale.cli.app", lambda **_: 130)
    fails(moescale("--dry-run"), 130, "resumes")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run(source: Path, tmp_path: Path, number: int) -> None:
    """130, one line, nothing that loads; the same command then completes the same bytes."""
    out, marker = tmp_path / "out", tmp_path / "marker"
    child = slow(SLOW, marker, source, out, "-k", "3", "-q", "-j", "1")
    child.send_signal(number)
    output, errors = child.communicate(timeout=120)
    done = Done(child.returncode, output, errors)
    fails(done, 130, "resumes", "of unfinished shards will be written again.")
    assert not (out / "config.json").exists()
    assert shell(source, out, "-k", 3, "-q") == Done(0, f"{out}\n", "")
    assert shell(source, tmp_path / "whole", "-k", 3, "-q").code == 0
    assert checkpoints.tree(out) == checkpoints.tree(tmp_path / "whole")


SLOW_PROOF = """
import sys, time
from pathlib import Path
from support import signals
from moescale.conversion import verify as verify
from moescale.checkpoint import rewrite
rewrite.PIECE = rewrite.EDIT_PIECE = 64
expected, marker, told = verify.expected, Path(sys.argv[1]), signals.told()
def slow(*arguments):
    for number, piece in enumerate(expected(*arguments)):
        if number >= 3:  # of a shard, since all other files are shorter
            marker.write_text(str(number))
            told.wait(100)
            time.sleep(0.1)
        yield piece
verify.expected = slow
sys.argv[:2] = ["moescale"]
from moescale.cli import main
main()
"""


def test_an_interrupted_verification(moescale: Command, source: Path, tmp_path: Path) -> None:
    """A verification stops at the next piece, not at the end of the shard."""
    out, marker = tmp_path / "out", tmp_path / "marker"
    assert moescale(source, out, "-k", 3).code == 0
    child = slow(SLOW_PROOF, marker, source, out, "-k", "3", "-q", "-j", "1", "--verify")
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=120)
    fails(Done(child.returncode, output, errors), 130)
    assert 3 <= int(marker.read_text()) < 10  # of the hundreds of pieces in a shard


def test_a_second_run_at_the_same_time(source: Path, tmp_path: Path) -> None:
    """While one command writes, the same command elsewhere gives 3."""
    out, marker = tmp_path / "out", tmp_path / "marker"
    child = slow(SLOW, marker, source, out, "-k", "3", "-q")
    try:
        fails(shell(source, out, "-k", 3, "-q"), 3, "another run")
    finally:
        child.kill()
        child.communicate()
    assert shell(source, out, "-k", 3, "-q").code == 0


# Help and version ---------------------------------------------------------------------------------


def test_help_leads_with_examples(moescale: Command) -> None:
    """The help begins with commands to copy, before the list of options."""
    done = moescale("--help")
    assert moescale("-h") == done
    assert (done.code, done.err) == (0, "")
    assert 0 < done.out.index("Examples:") < done.out.index("--experts M")
    assert done.out.count(" -k ") > 5 and "--experts 3" not in done.out
    assert done.out.index("moescale ./") < done.out.index("Options:")
    assert not set(BOXES) & set(done.out)


def test_help_lists_every_option(moescale: Command) -> None:
    """The help lists each option by name."""
    text = moescale("--help").out
    for option in (
        "--experts",
        "--trained-experts",
        "--rule",
        "--rho",
        "--factor ",
        "--factors",
        "--fold",
        "--revision",
        "--part",
        "--arch",
        "--pattern",
        "--experts-key",
        "--private",
        "--public",
        "--create-pr",
        "--commit-message",
        "--jobs",
        "--dry-run",
        "--verify",
        "--overwrite",
        "--json",
        "--quiet",
        "--verbose",
        "--version",
        "--list-types",
    ):
        assert option in text
    assert text.startswith("Usage: moescale SRC DST -k M [OPTIONS]\n")


def test_help_fits_a_screen_or_two(moescale: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns the help has fewer than 70 lines and ends with the shell completion."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = moescale("--help").out.splitlines()
    assert len(lines) < 70
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[-2:]] == ["--install-completion", "--show-completion"]


def test_help_shows_the_options_in_sections(moescale: Command) -> None:
    """What everyone needs comes first; each option appears once, under a heading."""
    text = moescale("--help").out
    headings = re.findall(r"^(\S.*):$", text, re.M)
    assert headings[:2] == ["Options", "Which factor, and where it goes"]
    assert headings[-1] == "Other"
    assert len(headings) == 6
    first = text.partition("\nOptions:\n")[2].partition(headings[1])[0]
    assert re.findall(r"^  (?:-\w, )?--(\w+)", first, re.M)[:3] == ["experts", "dry", "verify"]
    assert "(required)" in first.splitlines()[0]
    names = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M)
    assert len(names) == len(set(names)) == len(get_command(app).params) - 2 + 1  # --help


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("--rule g", {"gates"}),
        ("--fold ", {"weights", "config", "scale", "residual"}),
        ("--arch mixt", {"mixtral"}),
        ("--part ta", {"talker"}),
    ],
)
def test_the_shell_completes_what_an_option_takes(typed: str, completed: set[str]) -> None:
    """The completions are names from the tables, not files."""
    line = {"COMP_WORDS": f"moescale {typed}", "COMP_CWORD": "2"}
    environment = {**os.environ, **line, "_MOESCALE_COMPLETE": "complete_bash"}
    assert set(shell(env=environment).out.split()) == completed


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_little(option: str) -> None:
    """Neither imports numpy, the Hub's client, rich or anything else that starts slowly."""
    code = (
        "import sys; from moescale.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'numpy', 'huggingface_hub', 'rich', 'pydantic', 'asyncio', 'tqdm', 'yaml'}\n"
        "print(sorted(slow & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, option]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_known_types_can_be_listed(moescale: Command) -> None:
    """Each model type has a line with what happens to it; the JSON agrees with the docs."""
    done = moescale("--list-types")
    assert (done.code, done.err) == (0, "")
    lines = dict(re.split("  +", line) for line in done.out.splitlines())
    assert lines["mixtral"] == "scaled"
    assert "the number of experts stays" in lines["phimoe"]
    types = json.loads(moescale("--list-types", "--json").out)["types"]
    assert len(types) == len(lines)
    of = {kind: [row for row in types if row["format"] == kind] for kind in ("safetensors", "gguf")}
    assert {row["model_type"] for row in of["safetensors"]} == set(architectures.known_types())
    assert {row["model_type"] for row in of["gguf"]} == set(llama_cpp.BY_NAME)
    assert lines["qwen3moe (GGUF)"] == "scaled"
    assert lines["gemma4 (GGUF)"].startswith("only --rule none: a norm on the routed output")
    assert lines["dflash (GGUF)"].startswith("refused")
    assert "stays if it has ffn_gate_tid2eid" in lines["deepseek4 (GGUF)"]
    (olmoe,) = (row for row in of["gguf"] if row["model_type"] == "olmoe")
    assert not olmoe["fold_config"] and not olmoe["fold_scale"] and olmoe["gates"] == "yes"
    found = next(row for row in types if row["model_type"] == "deepseek_v3")
    assert found["fold_config"] is True and found["effect"] == "scaled"
    assert found["gate_scale"].startswith("yes, with a warning: a bias")
    assert [row.effect for row in api.model_types()] == [row["effect"] for row in types]


def test_version() -> None:
    """The version alone is on stdout."""
    assert shell("--version") == Done(0, f"moescale {__version__}\n", "")


def test_no_arguments_are_a_usage_error(moescale: Command) -> None:
    """Without arguments the help is shown, and nothing is done."""
    done = moescale()
    assert done.code == 2
    assert "Examples:" in done.out + done.err


# The ends of the streams and of the process ------------------------------------------------------


def test_a_reader_that_went_away_is_no_traceback(source: Path) -> None:
    """``moescale ... | head -1`` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "moescale", source, "-k", "3", "--dry-run"]
    child = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in child.stderr
    assert "Exception ignored" not in child.stderr


FULL_DISK = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")


def buffered() -> dict[str, str]:
    """The environment of a user: the streams are flushed when they are full, or at the end."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@full_disk
@pytest.mark.parametrize("option", ["--version", "--list-types", "--help"])
def test_output_that_nobody_can_read_is_an_error(option: str) -> None:
    """A full disk behind stdout gives one line, for a short text and for a long one."""
    with FULL_DISK.open("w") as full:
        command = [sys.executable, "-m", "moescale", option]
        pipe = subprocess.PIPE
        done = subprocess.run(
            command, stdout=full, stderr=pipe, text=True, env=buffered(), check=False
        )
    assert (done.returncode, done.stderr) == (1, "moescale: output: No space left on device\n")


@full_disk
def test_the_exit_code_does_not_need_stderr() -> None:
    """Where the message of an error cannot be written, its exit code remains."""
    with FULL_DISK.open("w") as full:
        command = [sys.executable, "-m", "moescale", "nothing", "-k", "3"]
        done = subprocess.run(command, stderr=full, env=buffered(), check=False)
    assert done.returncode == 2


ENDS = """
import atexit, sys
class Freed:
    def __del__(self): print("freed")
freed = Freed()
if {earlier}: atexit.register(print, "earlier")
from moescale.__main__ import main
try: main()
finally: atexit.register(print, "later")
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["nothing", "-k", "3"], 2)])
@pytest.mark.parametrize("earlier", [False, True])
def test_the_process_ends_after_all_exit_handlers(
    arguments: list[str], code: int, earlier: bool
) -> None:
    """No object is freed then, unless a program registered a handler before it called `main`."""
    command = [sys.executable, "-c", ENDS.format(earlier=earlier), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=buffered(), check=False)
    printed = ["later", "earlier", "freed"] if earlier else ["later"]
    assert (done.returncode, done.stdout.splitlines()[code == 0 :]) == (code, printed)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "moment",
    [
        "cli._open_streams = interrupt",
        "cli._fail = interrupt",
        "cli._flush_output = interrupt",
        "cli.app = wrapped",
    ],
)
def test_an_interrupt_outside_of_a_run_is_one_line(moment: str) -> None:
    """Also before and after the run, and while Python makes a class (3.11 wraps the exception)."""
    script = (
        "import os, signal\n"
        "from moescale import cli; from moescale.__main__ import main\n"
        "def interrupt(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        "class Field:\n"
        "    def __set_name__(self, *_): interrupt()\n"
        "def wrapped(**_): type('Made', (), {'field': Field()})\n"
        f"{moment}\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "nothing", "-k", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = "moescale: interrupted; the same command resumes\n"
    assert (done.returncode, done.stderr[-len(line) :]) == (130, line)
    assert "Traceback" not in done.stderr


def test_a_stream_that_a_program_took_away_is_no_error() -> None:
    """Such as by ``python -m cProfile -m moescale --version | head -1``."""
    script = (
        "import sys; from moescale.__main__ import main\ntry: main()\nfinally: sys.stdout = None\n"
    )
    command = [sys.executable, "-c", script, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_of_ours_is_a_traceback() -> None:
    """An exception that nobody expects is shown, with exit code 1."""
    script = (
        "from moescale import cli; from moescale.__main__ import main\n"
        "cli.main = lambda: 1 / 0\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_output_of_any_name_can_be_printed(tmp_path: Path) -> None:
    """An ASCII-only terminal does not end the run."""
    source = checkpoints.mixtral(tmp_path / "caf\u00e9", extras=False)
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = shell(source, tmp_path / "\u00fcber", "-k", 3, env=env)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err


def test_a_small_run_needs_little_time_and_no_hub(source: Path, out: Path) -> None:
    """A local run imports no slow package that it does not need."""
    code = (
        "import sys; from moescale.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'huggingface_hub', 'torch', 'httpx', 'hf_xet', 'pydantic'}"
        " & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, source, out, "-k", "3", "-q", "--verify"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("place", ["", " "])
def test_an_empty_place_is_refused(moescale: Command, source: Path, place: str) -> None:
    """An unset shell variable does not mean the current directory."""
    fails(moescale(source, place, "-k", 3, "--overwrite"), 2, "empty")
    fails(moescale(place, "out", "-k", 3), 2, "empty")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12},
        {"num_local_experts": 10**12},
        {"model_type": "qwen2_moe", "decoder_sparse_step": "x"},
        {"model_type": "qwen2_moe", "mlp_only_layers": 5},
        {"model_type": "deepseek_v3", "first_k_dense_replace": "x"},
        {"model_type": "deepseek_v3", "n_group": "4", "topk_group": 2},
    ],
)
def test_nonsense_in_the_config_is_one_line(
    moescale: Command, source: Path, change: dict[str, Any]
) -> None:
    """A value of another type or a huge number gives neither a traceback nor a hang."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    done = moescale(source, "-k", 2, "--dry-run")
    assert done.code == 3
    assert "Traceback" not in done.err


def test_report_draws_the_plan_of_a_dry_run_and_of_a_run(
    moescale: Command, source: Path, out: Path, tmp_path: Path
) -> None:
    """The page is the same with and without --dry-run; --report does not change stdout."""
    pages = [tmp_path / "dry.html", tmp_path / "run.html"]
    plain = moescale(source, out, "-k", 3, "--dry-run")
    assert moescale(source, out, "-k", 3, "--dry-run", "--report", pages[0]).out == plain.out
    assert not out.exists()
    assert moescale(source, out, "-k", 3, "-q", "--report", pages[1]).out == f"{out}\n"
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert b"Norm of the routed output" in pages[0].read_bytes()


def test_a_report_that_cannot_be_written_stops_the_run_before_it_starts(
    moescale: Command, source: Path, out: Path, tmp_path: Path
) -> None:
    """A path without a folder, or inside a checkpoint, gives one line, and nothing is written."""
    missing = moescale(source, out, "-k", 3, "--report", tmp_path / "no" / "r.html")
    fails(missing, 2, "r.html: No such file or directory")
    fails(moescale(source, out, "-k", 3, "--report", tmp_path), 2, "Is a directory")
    fails(moescale(source, out, "-k", 3, "--report", source / "r.html"), 2, "lies in")
    assert not out.exists()
    assert not (source / "r.html").exists()
