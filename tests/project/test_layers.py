"""The layers: imports point downwards; packages below the plan do not know each other."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

import moescale
from moescale.families.config import Config

PACKAGE = Path(__file__).parents[2] / "src" / "moescale"

BELOW = {"errors", "version", "checkpoint", "factors", "routers", "families", "storage"}
"""The layers below the plan and everything that reads it."""

MAY_USE = {
    "errors": set(),
    "checkpoint": {"errors"},
    "factors": {"errors"},
    "routers": {"factors"},
    "options": {"errors", "checkpoint"},
    "families": {"errors", "checkpoint", "routers"},
    "storage": {"errors", "checkpoint", "version"},
    "planning": {*BELOW, "options"},
    "results": {*BELOW, "planning"},
    "calibrate": {*BELOW, "options", "planning"},
    "conversion": {*BELOW, "options", "planning", "calibrate", "results"},
    "report": {*BELOW, "planning", "results"},
    "api": {*BELOW, "options", "planning", "results", "calibrate", "conversion", "report"},
}
"""The packages that each package may import besides itself."""

COMMAND = {"__main__.py", "cli.py", "interrupts.py", "progress.py", "terminal.py"}
"""The modules that may use streams, exit codes, signals and environment variables."""


def imports(path: Path) -> set[str]:
    """The packages and modules of moescale that a file imports, at any level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "moescale":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moescale."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moescale.")}
    return found


def files_of(package: str) -> list[Path]:
    """The modules of a package, or the module of this name."""
    file = PACKAGE / f"{package}.py"
    return [file] if file.exists() else sorted((PACKAGE / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_USE)
def test_a_package_imports_only_what_is_below(package: str) -> None:
    """A package imports only itself and the packages below it."""
    files = files_of(package)
    assert files
    for path in files:
        assert imports(path) <= MAY_USE[package] | {package}, path


def test_only_what_opens_a_location_knows_what_is_there() -> None:
    """Only one module outside of the local and Hub storages names them."""
    named = re.compile(r"moescale\.storage\.(?:local|hub)\b")
    users = {p for p in PACKAGE.rglob("*.py") if named.search(p.read_text(encoding="utf-8"))}
    others = {p for p in users if p.parent.name not in ("local", "hub")}
    assert {path.relative_to(PACKAGE).as_posix() for path in others} == {"storage/opening.py"}


@pytest.mark.parametrize(
    ("package", "own", "other"),
    [
        ("storage", "hub", "local"),
        ("storage", "local", "hub"),
        ("checkpoint", "gguf", "safetensors"),
        ("checkpoint", "safetensors", "gguf"),
    ],
)
def test_siblings_know_nothing_of_each_other(package: str, own: str, other: str) -> None:
    """A module of one does not name the other; what they share is beside their folders."""
    files = sorted((PACKAGE / package / own).glob("*.py"))
    assert files
    for path in files:
        assert f"moescale.{package}.{other}" not in path.read_text("utf-8"), path


def test_a_run_knows_no_format() -> None:
    """A run and its verification read a plan; only planning names the formats."""
    for path in files_of("conversion"):
        assert not re.search(r"checkpoint\.(?:safetensors|gguf)\b", path.read_text("utf-8")), path


def test_nothing_imports_the_command() -> None:
    """Only ``__main__`` imports the command line."""
    users = {p.name for p in PACKAGE.rglob("*.py") if "cli" in imports(p)}
    assert users == {"__main__.py"}


def test_a_plan_needs_no_numpy(tmp_path: Path) -> None:
    """Numpy takes 15 MB and half of the start-up time; only runs and rules that sample load it."""
    checkpoints.mixtral(tmp_path / "model")
    code = (
        "import sys, moescale; moescale.plan(sys.argv[1], experts=3, rule='preserve');"
        "sys.exit('numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    assert subprocess.run(command, check=False).returncode == 0


def test_only_the_command_handles_signals() -> None:
    """A library leaves the handlers of its program alone."""
    users = {p.name for p in PACKAGE.rglob("*.py") if "interrupts" in imports(p)}
    assert users == {"__main__.py", "cli.py"}


def test_only_what_runs_models_imports_torch() -> None:
    """Torch and transformers are an extra; everything else works without them."""
    asks = re.compile(r"^\s*(?:import|from) (?:torch|transformers|accelerate)\b", re.MULTILINE)
    users = {p for p in PACKAGE.rglob("*.py") if asks.search(p.read_text(encoding="utf-8"))}
    assert {path.parent.name for path in users} == {"calibrate"}


def test_the_command_uses_only_what_is_public() -> None:
    """Everything that the command can do is possible from Python."""
    own = {"interrupts", "options", "report", "version"}
    assert imports(PACKAGE / "cli.py") - own <= {"api", *moescale.__all__}


def touched(path: Path) -> set[str]:
    """The effects of a file on the process: output, exits, signal handlers, variables."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found.add(ast.unparse(node.value))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
            found.add(ast.unparse(node))
    return found & FOR_THE_COMMAND


FOR_THE_COMMAND = {
    *("print", "input", "exit", "sys.exit", "os._exit", "sys.stdout", "sys.stderr"),
    *("signal.signal", "faulthandler.enable", "gc.set_threshold"),
    *(f"os.environ.{call}" for call in ("setdefault", "update", "pop")),
    *("os.environ", "os.putenv", "os.chdir", "locale.setlocale"),
}


def test_only_the_command_touches_the_process() -> None:
    """No other module prints, exits, sets signal handlers or changes environment variables."""
    found = {path.name: what for path in PACKAGE.rglob("*.py") if (what := touched(path))}
    assert found.keys() <= COMMAND
    assert {"print", "sys.exit", "os.environ.setdefault"} <= found["cli.py"]


PARSERS = {
    *("config.py", "config_search.py", "duplicate_counts.py"),
    *("moe_config.py", "unread_keys.py"),
}
"""The modules of `families` that see the parsed values of a config; all others get records."""

OTHER_MAPPINGS = {
    "api.py": {"given"},  # options
    "calibrate/blocks.py": {"named"},  # arguments of a module of the model
    "planning/factors.py": {"made_for"},
    "planning/formats/gguf.py": {"record"},
    "planning/provenance.py": {"content", "wanted", "calibration"},  # moescale.json
}
"""Parameters that are mappings of any values, but not those of a config."""

ANY_VALUES = re.compile(r"\bSection\b|\b(?:Mapping|dict)\b(?!\[(?!str, (?:Any|object)\]))")
"""An annotation that may be parsed JSON."""


def above_the_parsers() -> dict[str, ast.Module]:
    """The modules that get records of the config, by path."""
    packages = ("families", "planning", "calibrate", "conversion", "results", "report", "api")
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8"))
        for package in packages
        for path in files_of(package)
        if package != "families" or path.name not in PARSERS
    }


def passed_mappings(path: str, module: ast.Module) -> set[str]:
    """The parameters that are mappings of any values; in families, also what functions return."""
    typed: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(module):
        if isinstance(node, ast.arg) and node.arg not in OTHER_MAPPINGS.get(path, set()):
            typed.append((node.arg, node.annotation))
        elif isinstance(node, ast.FunctionDef) and path.startswith("families/"):
            typed.append((node.name, node.returns))
    return {name for name, type_ in typed if type_ and ANY_VALUES.search(ast.unparse(type_))}


def test_nothing_takes_a_parsed_config() -> None:
    """Only the parsing modules pass the values of a config on as a mapping."""
    modules = above_the_parsers().items()
    found = {path: passed_mappings(path, module) for path, module in modules}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_values_of_a_config_stay_with_its_parsers() -> None:
    """No other module asks a `Config` for what it has, or returns, as a mapping."""
    raw = {name for name, kind in Config.__annotations__.items() if ANY_VALUES.search(str(kind))}
    for name, method in vars(Config).items():
        if ANY_VALUES.search(str(getattr(method, "__annotations__", {}).get("return"))):
            raw.add(name)
    assert len(raw) == 2
    found = {
        (path, ast.unparse(node))
        for path, module in above_the_parsers().items()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and node.attr in raw
    }
    assert found == set()


def test_the_config_is_parsed_at_the_door() -> None:
    """One module parses the config, one that of a model in a subfolder; one knows the layers."""
    callers = {
        path
        for path, module in above_the_parsers().items()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_config"
    }
    assert callers == {"planning/formats/safetensors.py", "planning/extra_files.py"}
    readers = {
        p.name for p in PACKAGE.rglob("*.py") if '"per_layer_config"' in p.read_text("utf-8")
    }
    assert readers == {"moe_config.py"}


@pytest.mark.parametrize("options", [{}, {"fold": "config"}])
def test_a_plan_parses_the_config_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's config is the source's text with other numbers, and is not parsed again."""
    source = checkpoints.deepseek(tmp_path / "in", routed_scaling_factor=2.5)
    texts, loads = [], json.loads

    def load(text: str | bytes, **given: Any) -> Any:
        texts.append(text)
        return loads(text, **given)

    monkeypatch.setattr(json, "loads", load)
    plan = moescale.plan(source, experts=3, rule="preserve", **options)
    assert "vllm" in plan.overrides and b'"num_experts_per_tok": 3' in (plan.config or b"")
    configs = [text for text in texts if "routed_scaling_factor" in str(text)]
    assert configs == [(source / "config.json").read_text("utf-8")]


def test_files_import_one_another_in_no_circle() -> None:
    """The import graph of the modules, including imports inside functions, has no cycle."""
    below = {path: modules_of(path) for path in PACKAGE.rglob("*.py")}
    while below:
        free = {path for path, modules in below.items() if not modules & below.keys() - {path}}
        assert free, sorted(str(path.relative_to(PACKAGE)) for path in below)
        below = {path: modules for path, modules in below.items() if path not in free}


def modules_of(path: Path) -> set[Path]:
    """The files of the package that a file imports, at any level."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    files = (PACKAGE.parent / Path(*name.split(".")).with_suffix(".py") for name in names)
    return {file for file in files if file.exists()}


def test_a_location_is_parsed_once() -> None:
    """Only the location module knows the syntax of a Hub reference; the others take its record."""
    asks = re.compile(r"startswith\([^)]*(?:hf://|PREFIX)|removeprefix\([^)]*(?:hf://|PREFIX)")
    users = {p.name for p in PACKAGE.rglob("*.py") if asks.search(p.read_text(encoding="utf-8"))}
    assert users == {"location.py"}


PAGES = ("CONTRIBUTING.md", "docs/architecture.md")
"""The pages with the picture of the layers."""


def drawn_arrows(page: str) -> set[tuple[str, str]]:
    """The arrows of the picture, each from a package to one that it may import."""
    text = (PACKAGE.parents[1] / page).read_text("utf-8")
    lines = re.findall(r"^ +(\w[\w &]*) --> (\w[\w &]*)$", text, re.MULTILINE)
    return {(a, b) for left, right in lines for a in left.split(" & ") for b in right.split(" & ")}


@pytest.mark.parametrize("page", PAGES)
def test_the_layers_are_as_drawn(page: str) -> None:
    """A package may import only what its arrows reach, directly or indirectly."""
    arrows = drawn_arrows(page)
    for package, allowed in MAY_USE.items():
        reached, new = set(), {package}
        while new:
            reached |= new
            new = {b for a, b in arrows if a in new} - reached
        assert allowed - {"version"} <= reached, package
        assert {b for a, b in arrows if a == package} <= allowed, package
