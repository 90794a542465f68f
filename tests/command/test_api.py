"""From Python: the same as the command, typed, silent, and with nothing left running."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import typer
from support import checkpoints
from support.gated_checkpoints import gated_mixtral

import moescale
from moescale import api, cli
from moescale.errors import SourceError, UsageError
from moescale.options import (
    ConvertOptions,
    Options,
    PlanOptions,
    Rescaling,
    Rule,
    VerifyOptions,
    option_rows,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which contains a small Mixtral under the name used in examples."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return checkpoints.mixtral(tmp_path / "Mixtral-8x7B")


# Public names -------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_no_other_is() -> None:
    """Every name in `__all__` can be imported from the package, and an editor sees it."""
    assert set(moescale.__all__) <= set(dir(moescale))
    for name in moescale.__all__:
        assert getattr(moescale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moescale.nothing


LAZY = """
import sys
before = set(sys.modules)
import moescale
moescale.errors.UsageError, dir(moescale)
print(sorted(name for name in set(sys.modules) - before if name.startswith("moescale")))
heavy = {"numpy", "huggingface_hub", "typer", "torch", "json", "threading", "pathlib"}
print(sorted(heavy & (set(sys.modules) - before)))
"""


def test_the_import_costs_nothing() -> None:
    """``import moescale`` imports its errors and its version, and no other module."""
    command = [sys.executable, "-c", LAZY]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, heavy = child.stdout.splitlines()
    assert ours == "['moescale', 'moescale.errors', 'moescale.version']"
    assert heavy == "[]"


def test_the_keywords_are_the_fields_of_options() -> None:
    """Every option of a plan is available from Python, with the same or a wider type."""
    typed, kept = get_type_hints(Rescaling), get_type_hints(Options)
    assert (
        typed.keys() - {"max_memory", "device", "calibrate_out"}
        == kept.keys()
        == {field.name for field in fields(Options)}
    )
    for name in kept.keys() - {"factors", "calibrate"}:
        assert typed[name] == kept[name], name


@pytest.mark.parametrize(
    ("verb", "keywords"),
    [(api.plan, PlanOptions), (api.convert, ConvertOptions), (api.verify, VerifyOptions)],
)
def test_the_signature_shows_every_option(verb: Any, keywords: type) -> None:
    """`help` and a notebook show each option with type and default, not ``**options``."""
    signature = inspect.signature(verb)
    for name, hint in get_type_hints(keywords).items():
        assert signature.parameters[name].annotation == hint
        assert signature.parameters[name].default is (False if hint is bool else None)
    assert all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values())


@pytest.mark.parametrize(
    ("verb", "word", "meant"),
    [
        ("convert", "k", "experts"),
        ("convert", "check", "verify"),
        ("convert", "dry_run", "moescale.plan"),
        ("plan", "expert", "experts"),
        ("verify", "num_experts_per_tok", "experts"),
        ("verify", "n", "trained_experts"),
        ("plan", "j", None),
        ("convert", "j", "jobs"),
        ("convert", "src", "source"),
        ("convert", "output_dir", "destination"),
        ("convert", "num_workers", "jobs"),
        ("plan", "num_workers", None),
        ("plan", "calibration", "calibrate"),
        ("verify", "K", "experts"),
    ],
)
def test_a_wrong_keyword_names_the_right_one(verb: str, word: str, meant: str | None) -> None:
    """For words of the command, of configs and of other tools, the error gives our keyword."""
    suggested = rf"; {meant}\?" if meant else ""
    with pytest.raises(TypeError, match=rf"^{verb}\(\) has no option '{word}'{suggested}$"):
        getattr(moescale, verb)("a", **{word: 3})


@pytest.mark.parametrize(("verb", "word"), [("plan", "jobs"), ("verify", "overwrite")])
def test_an_option_of_another_verb_is_said_to_be_one(verb: str, word: str) -> None:
    """The option is not called unknown, and no other is suggested."""
    with pytest.raises(TypeError, match=rf"^{verb}\(\) has no option '{word}'; convert\(\) has$"):
        getattr(moescale, verb)("a", **{word: 3})


def test_a_number_in_place_of_a_path_is_told_its_name(there: Path) -> None:
    """A second or third positional argument is not the number of experts."""
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"^plan\(\) takes a path .*, not 3; experts=3\?$"):
        moescale.plan(there, wrong)
    with pytest.raises(TypeError, match=r"^convert\(\) takes a path .*, not \['a'\]$"):
        moescale.convert(destination="b", source=["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", [api.plan, api.convert, api.verify])
def test_what_is_raised_is_documented(verb: Any) -> None:
    """Each docstring lists existing errors, including TypeError for a wrong keyword."""
    text = (inspect.getdoc(verb) or "").partition("Raises:\n")[2]
    found = set(re.findall(r"^    (\w+): ", text, re.MULTILINE))
    assert {"TypeError", "UsageError", "SourceError", "TemporaryError"} <= found
    assert found - {"TypeError"} <= set(vars(moescale.errors))


def test_a_keyword_that_resembles_nothing_is_named() -> None:
    """A wrong suggestion would be worse than none."""
    with pytest.raises(TypeError, match=r"^plan\(\) has no option 'zzz'$"):
        moescale.plan("a", zzz=1)


@pytest.mark.parametrize("verb", [api.plan, api.convert, api.verify])
def test_every_option_of_the_command_is_a_keyword(verb: Any) -> None:
    """A long option is a keyword with underscores; exceptions are listed here."""
    own = {"dry_run", "version", "json", "quiet", "verbose", "install_completion", "list_types"}
    own |= {"show_completion", "public"}
    taken = {*inspect.signature(verb).parameters}
    lacks = {
        api.plan: {"jobs", "dask", "verify"},
        api.convert: set(),
        api.verify: {"overwrite", "private", "create_pr", "commit_message", "report", "verify"}
        | {"follow_links", "evaluate"},
    }[verb]
    options = {
        name[2:].replace("-", "_")
        for parameter in typer.main.get_command(cli.app).params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    }
    assert options - own - taken == lacks


# Documentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "convert", "verify", "record", "model_types"])
def test_the_examples_of_the_docstrings_hold(verb: str, there: Path) -> None:
    """Each docstring's example runs as printed, on a small Mixtral with the example's name."""
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(api, verb), verb, globs={})
    done = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert done.attempted >= 2
    assert done.failed == 0


@pytest.mark.parametrize("verb", [api.plan, api.convert])
def test_every_keyword_is_documented(verb: Any) -> None:
    """Each parameter has a line in the docstring, each option the line of the table."""
    text = inspect.getdoc(verb) or ""
    for name in inspect.signature(verb).parameters:
        assert re.search(rf"^ +{name}: ", text, re.MULTILINE), name
    assert option_rows(PlanOptions)["rho"].text in text


def test_every_error_says_when_it_is_raised() -> None:
    """All classes of `moescale.errors` have a docstring and are in the module's tree."""
    found = [c for c in vars(moescale.errors).values() if inspect.isclass(c)]
    assert len(found) > 8
    for kind in found:
        if issubclass(kind, Exception):
            assert kind.__doc__
            assert kind.__name__ in (moescale.errors.__doc__ or "")


# Types --------------------------------------------------------------------------------------------

SCRIPT = """
from pathlib import Path
import moescale

def tell(name: str, size: int) -> None: ...

plan: moescale.Plan = moescale.plan("a", experts=3, rule="gates", rho=0.5)
result: moescale.Result = moescale.convert(
    Path("a"), "b", experts=3, factors={"0": 1.2}, max_memory=1 << 30, progress=tell, verify=True
)
moescale.verify("a", "b", factors=Path("moescale.json"), jobs=2, progress=tell)
how: moescale.Rescaling = {"experts": 3, "fold": "config"}
moescale.plan("a", **how)
try:
    sizes: dict[str, float] = dict(plan.factors)
except moescale.errors.TemporaryError as error:
    hint: str | None = error.hint
moescale.plan("a", expert=3)  # wrong: call-arg
moescale.plan("a", experts="3")  # wrong: arg-type
moescale.plan("a", experts=3, rule="best")  # wrong: arg-type
moescale.convert("a", experts=3)  # wrong: call-arg
moescale.convert("a", "b", factors={0: 1.2})
moescale.convert("a", "b", factors={0: "1.2"})  # wrong: arg-type
moescale.convert("a", "b", experts=3, check=True)  # wrong: call-arg
moescale.convert("a", "b", experts=3, progress=3.0)  # wrong: arg-type
moescale.verify("a", "b", experts=3, overwrite=True)  # wrong: call-arg
result.state  # wrong: attr-defined
moescale.run  # wrong: attr-defined
"""

CONFIG = """
[mypy]
strict = True
[mypy-numpy.*,ml_dtypes.*,huggingface_hub.*,httpx.*,yaml.*,tqdm.*,torch.*,transformers.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-accelerate.*,safetensors.*,distributed.*,hf_xet.*]
follow_imports = skip
ignore_missing_imports = True
"""
"""Strict, without checking the types of other packages, which takes time."""


def test_a_script_is_checked_against_the_installed_package(tmp_path: Path) -> None:
    """Strict mypy accepts a correct script and finds each wrong keyword, type and attribute."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--no-pretty", "--hide-error-context"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = re.findall(r"^script\.py:(\d+): error: .* \[([a-z-]+)\]$", child.stdout, re.M)
    lines = enumerate(SCRIPT.splitlines(), 1)
    wanted = [(str(n), line.split("# wrong: ")[1]) for n, line in lines if "# wrong: " in line]
    assert found == wanted, child.stdout + child.stderr


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"experts": 3.0}, "--experts is 3.0: it must be a whole number"),
        ({"experts": True}, "--experts is True: it must be a whole number"),
        ({"experts": "3"}, "--experts is '3': it must be a whole number"),
        ({"experts": 3, "rho": "0.5"}, "--rho is '0.5': it must be a number"),
        ({"factor": "2"}, "--factor is '2': it must be a number"),
        ({"factors": {0: 1.2, "0": 1.3}}, "--factors: names a layer twice"),
        ({"factors": {"0": "1.2"}}, "not a number"),
        ({"factors": {}}, "has no factors"),
        ({"factors": {"factors": {"0": 1.2}, "router_scales": []}}, "has no router scales"),
        ({"factors": "nowhere.json"}, "--factors nowhere.json: No such file"),
        ({"experts": 3, "max_memory": "8GiB"}, "fitted or measured, or with --evaluate"),
    ],
)
def test_a_value_that_no_type_checker_saw_is_refused(options: Any, why: str, there: Path) -> None:
    """A value of the wrong type is a usage error before anything is read or written."""
    with pytest.raises(UsageError) as caught:
        moescale.convert(there, "out", **options)
    assert why in caught.value.message
    assert not Path("out").exists()


def test_a_keyword_that_is_none_is_a_type_error(there: Path) -> None:
    """An unknown keyword raises Python's TypeError, which names it."""
    with pytest.raises(TypeError, match="'expert'"):
        moescale.plan(there, expert=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_number_of_jobs_that_is_none_is_refused(there: Path, jobs: int) -> None:
    """Fewer than one job is a usage error."""
    for verb in (moescale.convert, moescale.verify):
        with pytest.raises(UsageError, match="--jobs"):
            verb(there, "out", experts=3, jobs=jobs)


def test_numbers_of_numpy_give_the_same_bytes(there: Path) -> None:
    """Integers and floats of other types keep their values, in the provenance too."""
    moescale.convert(there, "one", experts=3, factor=2.0)
    numbers: Any = {"experts": np.int64(3), "factor": np.float32(2)}
    moescale.convert(there, "two", **numbers)
    moescale.convert(str(there), "three", experts=3, factor=2)
    assert checkpoints.tree(Path("one")) == checkpoints.tree(Path("two"))
    assert checkpoints.tree(Path("one")) == checkpoints.tree(Path("three"))


def test_factors_come_as_a_mapping_or_from_an_earlier_output(there: Path) -> None:
    """A path means the factors in that file."""
    made = moescale.convert(there, "one", experts=3).plan
    assert moescale.plan(there, experts=3, factors="one/moescale.json").factors == made.factors
    assert moescale.plan(there, experts=3, factors=made.factors).factors == made.factors


def test_the_report_is_drawn_by_plan_and_convert(there: Path) -> None:
    """`report` names the page, which exists when `planned` is called."""
    moescale.plan(there, "out", experts=3, report="plan.html")
    seen: list[bytes] = []
    moescale.convert(
        there,
        "out",
        experts=3,
        report=Path("run.html"),
        planned=lambda plan: seen.append(Path("run.html").read_bytes()),
    )
    assert seen == [Path("plan.html").read_bytes()]


def test_a_bad_place_for_the_report_is_refused_before_anything_else(there: Path) -> None:
    """The refusal comes even before the source is read; an existing page stays."""
    Path("old.html").write_text("old")
    for report, why in (("no/r.html", "No such file"), (".", "directory"), ("x" * 999, "too long")):
        with pytest.raises(UsageError, match=f"--report .*{why}"):
            moescale.convert("nowhere", "out", experts=3, report=report)
        with pytest.raises(UsageError, match=f"--report .*{why}"):
            moescale.plan("nowhere", experts=3, report=report)
    with pytest.raises(SourceError):
        moescale.plan("nowhere", experts=3, report="old.html")
    assert Path("old.html").read_text() == "old"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (".", "directory"),
        ("no/own.jsonl", "No such file"),
        ("mine.txt", "exists, and is not text that a model generated"),
        ("{source}/own.jsonl", "lies in"),
        ("out/own.jsonl", "lies in"),
    ],
)
def test_a_bad_place_for_what_the_model_writes_is_refused_first(
    place: str, why: str, there: Path
) -> None:
    """The refusal comes before the model is loaded; an existing file stays."""
    Path("mine.txt").write_text("mine")
    before = checkpoints.tree(there)
    file = Path(place.format(source=there))
    with pytest.raises(UsageError, match=f"--calibrate-out .*{why}"):
        moescale.convert(there, "out", experts=3, rule="fitted", calibrate_out=file)
    assert checkpoints.tree(there) == before and Path("mine.txt").read_text() == "mine"
    assert not Path("out").exists()


def test_a_page_that_cannot_be_drawn_any_more_stops_nothing(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured factors would be lost with the run, so the run continues with a warning."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = moescale.convert(there, "out", experts=3, report="r.html")
    assert result.status == "new"
    assert result.plan.warnings[-1] == "--report r.html: No space left on device"


# Progress -----------------------------------------------------------------------------------------


def test_progress_adds_up_to_the_sizes_of_the_plan(there: Path) -> None:
    """Progress counts the run once, the verification once, and a finished job not at all."""
    done: Counter[str] = Counter()
    lock = threading.Lock()

    def progress(name: str, size: int) -> None:
        assert size >= 0
        with lock:
            done[name] += size

    result = moescale.convert(there, "out", experts=3, progress=progress)
    sizes = {file.name: result.plan.output_size(file) for file in result.plan.large_files}
    assert done == Counter(sizes)  # which counts an empty file the same as one without calls
    moescale.verify(there, "out", experts=3, progress=progress)
    assert done == Counter({name: 2 * size for name, size in sizes.items()})
    moescale.convert(there, "out", experts=3, progress=progress)
    assert done == Counter({name: 2 * size for name, size in sizes.items()})
    moescale.convert(there, "new", experts=3, progress=progress, verify=True)
    assert done == Counter({name: 4 * size for name, size in sizes.items()})


# Side effects -------------------------------------------------------------------------------------


def test_nothing_is_printed_or_changed(there: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No output, no warning, no signal handler, no environment variable, no thread."""

    def world() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return dict(os.environ), handlers, os.getcwd()

    gated_mixtral(there.parent / "gated")
    rules: list[Rule] = ["preserve", "gates"]
    before, threads = world(), set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in rules:
            moescale.plan("gated", rule, experts=3, rule=rule)
            moescale.convert("gated", rule, experts=3, rule=rule, verify=True)
            moescale.verify("gated", rule, experts=3, rule=rule)
        with pytest.raises(moescale.errors.SourceError):
            moescale.plan("gated/nothing here", experts=3)
    assert world() == before
    assert set(threading.enumerate()) <= threads
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_what_a_callback_raises_ends_the_threads(there: Path, error: type[BaseException]) -> None:
    """The exception leaves the call, no thread is left, and the same call resumes."""

    def fail(name: str, size: int) -> None:
        if name.startswith("model-00003"):
            raise error

    before = set(threading.enumerate())
    with pytest.raises(error):
        moescale.convert(there, "out", experts=3, jobs=2, progress=fail)
    assert set(threading.enumerate()) <= before
    assert moescale.convert(there, "out", experts=3, verify=True).status == "resume"


def test_an_interrupted_call_resumes(there: Path) -> None:
    """Ctrl-C in a notebook is a KeyboardInterrupt; the threads end, and the same call resumes."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pressed = threading.Event()

    def press(name: str, size: int) -> None:
        if not pressed.is_set():
            pressed.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            threading.Event().wait(0.3)

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        moescale.convert(there, "out", experts=3, jobs=1, progress=press)
    for thread in set(threading.enumerate()) - before:
        thread.join()  # a thread that is just starting is not waited for, but also ends
    assert not Path("out/config.json").exists()
    assert moescale.convert(there, "out", experts=3, verify=True).status == "resume"
