"""What a run with measured factors writes, and what a rerun reuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, quantised_checkpoints
from support.command import Command
from support.hub_checkpoints import Lab, laboratory
from support.tiny_models import build

from moescale import api
from moescale.calibrate import calibration, devices
from moescale.calibrate.devices import parse_memory
from moescale.errors import (
    DestinationError,
    InterruptedRun,
    SourceError,
    UnsupportedError,
    UsageError,
)
from moescale.report import terminal

pytestmark = pytest.mark.usefixtures("offline")

TEXT = bytes(range(256)) * 8


class Model:
    """A tiny byte-level Mixtral, a text, and how often the model was run."""

    def __init__(self, folder: Path) -> None:
        self.source, self.output, self.text = (folder / n for n in ("source", "output", "text"))
        build("mixtral", self.source, dtype="bfloat16", config={"vocab_size": 256})
        self.text.write_bytes(TEXT)
        self.runs = 0

    def options(self, **more: Any) -> dict[str, Any]:
        """The options of the job."""
        return {"experts": 3, "rule": "measured", "calibrate": self.text, **more}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model, with its measurements counted."""
    torch.set_num_threads(1)
    model = Model(tmp_path)
    measure = calibration.Calibration.__call__

    def counted(self: Any, *found: Any) -> Any:
        model.runs += 1
        return measure(self, *found)

    monkeypatch.setattr(calibration.Calibration, "__call__", counted)
    return model


def written(folder: Path) -> dict[str, bytes]:
    """The contents of all files of an output."""
    return {name: (folder / name).read_bytes() for name in checkpoints.tree(folder)}


def test_the_provenance_names_the_text_but_not_its_place(model: Model) -> None:
    """Provenance and card give the text's SHA-256 and length, and nothing about the machine."""
    plan = api.convert(model.source, model.output, **model.options()).plan
    content = json.loads((model.output / "moescale.json").read_text())
    assert content["calibration"] == {
        "text_sha256": calibration.digest(model.text),
        "bytes": len(TEXT),
        "context": 64,
    }
    assert content["factors"] == plan.factors
    assert len(set(plan.factors.values())) == 3
    assert all(float(f"{factor:.6g}") == factor for factor in plan.factors.values())
    assert str(model.text) not in (model.output / "moescale.json").read_text()
    card = (model.output / "README.md").read_text()
    sha256 = calibration.digest(model.text)[:12]
    assert f"| measured on | 2,048 bytes of text, SHA-256 {sha256}… |" in card


def test_a_long_text_is_cut_and_said_to_be(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan, the card and the provenance say that only the first tokens were used."""
    monkeypatch.setattr("moescale.calibrate.text.MAX_TOKENS", 2_100)
    model.text.write_bytes(TEXT * 2)
    plan = api.plan(model.source, **model.options())
    assert plan.calibration["cut"] is True
    assert "calibrated         on the first 2,100 bytes of text" in terminal.plan_text(plan)


def test_a_dry_run_beside_a_finished_output_takes_its_factors(model: Model) -> None:
    """The dry run reports what a run would do, so it measures only if the run would."""
    api.convert(model.source, model.output, **model.options())
    plan = api.plan(model.source, model.output, **model.options())
    assert model.runs == 1
    assert plan.warnings == ()
    os.utime(model.source / "config.json")
    again = api.plan(model.source, model.output, overwrite=True, **model.options())
    assert model.runs == 2
    assert again.factors == plan.factors


def test_a_finished_run_is_not_measured_again(model: Model) -> None:
    """The same command reports that it is done; verifying the output needs no model either."""
    api.convert(model.source, model.output, **model.options())
    assert api.convert(model.source, model.output, **model.options()).status == "done"
    assert api.convert(model.source, model.output, verify=True, **model.options()).verified
    assert api.verify(model.source, model.output, **model.options()).verified
    assert model.runs == 1


def test_an_interrupted_run_goes_on_with_the_factors_that_it_began_with(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rerun measures nothing, and its bytes are those of an uninterrupted run."""
    api.convert(model.source, tmp_path / "other", **model.options())

    def stop(name: str, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises((InterruptedRun, KeyboardInterrupt)):
        api.convert(model.source, model.output, progress=stop, **model.options())
    assert not (model.output / "config.json").exists()
    model.runs = 0
    assert api.convert(model.source, model.output, **model.options()).status == "resume"
    assert model.runs == 0
    assert written(model.output) == written(tmp_path / "other")


def test_another_text_is_another_job(model: Model) -> None:
    """An output is refused before anything is measured, unless it may be replaced."""
    api.convert(model.source, model.output, **model.options())
    model.text.write_bytes(TEXT[::-1])
    with pytest.raises(
        DestinationError, match=r"with 3 experts per token \(measured, on text [0-9a-f]{12}"
    ):
        api.convert(model.source, model.output, **model.options())
    assert model.runs == 1
    before = written(model.output)
    api.convert(model.source, model.output, overwrite=True, **model.options())
    assert model.runs == 2
    assert written(model.output)["moescale.json"] != before["moescale.json"]


def test_a_source_that_changed_is_measured_again(model: Model) -> None:
    """With --overwrite, factors of the old source are not used for the new one."""
    api.convert(model.source, model.output, **model.options())
    old = json.loads((model.output / "moescale.json").read_text())["factors"]
    build("mixtral", model.source, dtype="bfloat16", config={"vocab_size": 256}, seed=1)
    os.utime(model.source / "config.json")
    with pytest.raises(DestinationError, match="the source is newer"):
        api.convert(model.source, model.output, **model.options())
    result = api.convert(model.source, model.output, overwrite=True, **model.options())
    assert model.runs == 2
    assert result.plan.factors != old


@pytest.mark.parametrize(
    "broken",
    [
        {"factors": None},
        {"factors": {"0": 1.0, "1": 1.0}},
        {"factors": {"0": "x", "1": 1.0, "2": 1.0}},
        {"calibration": None},
        {"calibration": {"text_sha256": "0" * 64, "bytes": 2048}},
        {"calibration": {"bytes": "many"}},
    ],
)
def test_notes_that_are_none_are_not_used(model: Model, broken: dict[str, Any]) -> None:
    """A damaged provenance gives no factors; its output is refused, not taken as finished."""
    api.convert(model.source, model.output, **model.options())
    path = model.output / "moescale.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **broken}))
    (warning,) = api.plan(model.source, model.output, **model.options()).warnings
    assert "would be refused" in warning
    assert "changed since" in warning
    assert model.runs == 2
    with pytest.raises(DestinationError, match="changed since"):
        api.convert(model.source, model.output, **model.options())


def test_measured_factors_are_applied_where_there_is_no_torch(model: Model, tmp_path: Path) -> None:
    """The provenance of an output and the JSON of a dry run both work with --factors."""
    plan = api.convert(model.source, model.output, **model.options()).plan
    dry = tmp_path / "plan.json"
    dry.write_text(json.dumps(api.plan(model.source, **model.options()).as_json()))
    for number, file in enumerate((model.output / "moescale.json", dry)):
        output = tmp_path / f"again-{number}"
        code = (
            "import sys; sys.modules.update(torch=None, transformers=None, accelerate=None)\n"
            "from moescale.cli import main; main()"
        )
        arguments = [model.source, output, "-k3", "--factors", file, "-q"]
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
        made = json.loads((output / "moescale.json").read_text())
        assert (made["rule"], made["factors_rule"]) == ("factors", "measured")
        assert made["calibration"] == plan.calibration
        assert "| `factors`, made by `measured` |" in (output / "README.md").read_text()
        for large in plan.large_files:
            assert (output / large.name).read_bytes() == (model.output / large.name).read_bytes()


def test_a_format_that_takes_no_such_factor_is_refused_before_the_model_is_run(
    model: Model, tmp_path: Path
) -> None:
    """Some scales only store powers of two, and a measured factor is not one."""
    case = next(case for case in quantised_checkpoints.POWER_OF_TWO if case.family == "gpt_oss")
    quantised_checkpoints.write(case, tmp_path / "in")
    with pytest.raises(UnsupportedError, match="powers of two"):
        api.plan(tmp_path / "in", **model.options(experts=1))
    assert model.runs == 0


def test_torch_is_imported_only_to_measure(model: Model) -> None:
    """A plan with another rule and a finished job do not need the extra."""
    api.convert(model.source, model.output, **model.options())
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, accelerate=None)\n"
        "from moescale import api\n"
        "source, output, text = sys.argv[1:]\n"
        "api.plan(source, experts=3)\n"
        "options = dict(experts=3, rule='measured', calibrate=text)\n"
        "assert api.convert(source, output, **options).status == 'done'"
    )
    places = map(str, (model.source, model.output, model.text))
    subprocess.run([sys.executable, "-c", code, *places], check=True)


def test_without_the_extra_one_line_says_what_to_install(
    model: Model,
    moescale: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2, and nothing is written."""
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    done = moescale(model.source, model.output, "-k3", "--rule=measured", "--calibrate", model.text)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "moescale: --rule measured needs torch, transformers, accelerate to run the model",
        "Install them with pip install '.[measure]' in the clone, or: pip install torch"
        " transformers accelerate",
    ]
    assert not model.output.exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--calibrate", "{text}"], "--calibrate goes with --rule fitted or measured"),
        (["--rule", "measured", "--calibrate", "nowhere"], "nowhere: No such file or directory"),
        (["--rule=fitted", "--calibrate={text}", "--fold=config"], "needs one factor for all"),
        (["--max-memory", "8GiB"], "--max-memory goes with --rule fitted or measured"),
        (["--rule=measured", "--calibrate={text}", "--max-memory=0"], "--max-memory is '0'"),
        (["--rule=measured", "--calibrate={text}", "--rho=1"], "--rho has no meaning"),
        (["--rule=measured", "--calibrate={short}"], "has 7 bytes, needs 2,048"),
    ],
)
def test_wrong_use_is_exit_code_2(
    arguments: list[str],
    why: str,
    model: Model,
    moescale: Command,
    tmp_path: Path,
) -> None:
    """Wrong options and texts are an error of one or two lines, before anything is written."""
    short = tmp_path / "short"
    short.write_bytes(b"1234567")
    texts = {"{text}": model.text, "{short}": short}
    for name, path in texts.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    done = moescale(model.source, model.output, "-k3", *arguments)
    assert (done.code, done.out) == (2, "")
    assert why in done.err
    assert len(done.err.splitlines()) <= 2
    assert not model.output.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_a_text_that_is_no_file_is_refused_and_not_waited_for(
    model: Model,
    moescale: Command,
    tmp_path: Path,
) -> None:
    """A pipe can be read only once, and a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    for text in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        done = moescale(model.source, model.output, "-k3", "--rule=measured", "--calibrate", text)
        assert (done.code, done.out) == (2, "")
        assert f"--calibrate {text}: must be a regular file" in done.err


def test_an_interrupted_measurement_writes_nothing(
    model: Model,
    moescale: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupted measurement saves no factors, so a rerun measures from the beginning."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration.Calibration, "__call__", stop)
    done = moescale(model.source, model.output, "-k3", "--rule=measured", "--calibrate", model.text)
    assert done.code == 130
    assert done.err.endswith("the same command resumes\n")
    assert not model.output.exists()


def test_a_dry_run_measures_and_writes_nothing(
    model: Model,
    moescale: Command,
    tmp_path: Path,
) -> None:
    """A dry run prints the factors, as text and as JSON."""
    before = checkpoints.tree(tmp_path)
    done = moescale(
        model.source, "-k3", "--rule=measured", "--calibrate", model.text, "--dry-run", "--json"
    )
    plan = json.loads(done.out)
    assert done.code == 0
    assert plan["calibration"]["bytes"] == len(TEXT)
    assert plan["rule"] == "measured"
    assert checkpoints.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8GB", 8 * 10**9), ("512 mib", 512 << 20), ("1.5k", 1500), ("7", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """With binary and decimal units, in either case."""
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "8 apples", "1e3", "nan", "9" * 400])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    """The error shows what a size looks like."""
    with pytest.raises(UsageError, match="such as 8GiB"):
        parse_memory(text)


# The Hub -------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A Hub lab without a Hub so far."""
    with laboratory(tmp_path / "lab", monkeypatch) as lab:
        yield lab


def test_a_model_on_the_hub_is_downloaded_once(lab: Lab, model: Model) -> None:
    """The model is downloaded into the cache, measured, and converted from there."""
    hub = lab.start()
    lab.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    files = {name: model.source / name for name in checkpoints.tree(model.source)}
    files["pytorch_model.bin"] = model.text
    commit = hub.add_repo("lab/bytes", files)
    options = ["-k3", "--rule=measured", f"--calibrate={model.text}", "--json"]
    done = lab.done("lab/bytes", str(model.output), *options)
    plan = json.loads(done.out)
    assert plan["source"] == {"kind": "hub", "id": "lab/bytes", "revision": commit}
    assert plan["factors"] == dict(api.plan(model.source, **model.options()).factors)
    weights = [f.stat().st_size for f in model.source.glob("*.safetensors")]
    snapshot = lab.root / "home" / "hub" / "models--lab--bytes" / "snapshots" / commit
    assert {p.name for p in snapshot.glob("model*")} == {
        p.name for p in model.source.glob("model*")
    }
    assert not (snapshot / "pytorch_model.bin").exists()
    assert (
        done.err
        == "warning: left out: pytorch_model.bin: weights in another format, not rescaled\n"
    )
    headers = 32 << 10  # as many bytes are read to find a shard's header, or what a .bin contains
    sent = hub.traffic("^cdn|resolve")[1]
    assert sum(weights) <= sent < sum(weights) + (len(weights) + 1) * headers + (20 << 10)
    again = lab.done("lab/bytes", str(model.output), *options)
    assert json.loads(again.out)["result"]["status"] == "done"


def test_a_cache_without_room_is_said_before_the_download(lab: Lab, model: Model) -> None:
    """The error says how much space is needed and where."""
    hub = lab.start()
    files = {name: model.source / name for name in checkpoints.tree(model.source)}
    hub.add_repo("lab/bytes", files)
    free = type("Usage", (), {"free": 7})
    lab.monkeypatch.setattr("moescale.storage.hub.source.shutil.disk_usage", lambda path: free)
    with pytest.raises(SourceError, match=r"needs a download of .* 7 B are free .*\nFree some"):
        api.plan("lab/bytes", **model.options())
