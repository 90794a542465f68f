"""How the scripts find Python and create an environment; a stand-in replaces Python and pip."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "environment.sh"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the scripts are for POSIX shells")

# Prints its version, copies itself into an environment, and logs the calls of pip.
STAND_IN = """#!/bin/sh
case "$1 $2" in
  "-c "*) exit "${TOO_OLD:-0}" ;;
  "-VV ") echo "Python ${SAYS:-3.14.0}" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; echo "$*" >> pip.log; exit "${PIP_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a project, a lock and a stand-in for Python."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    (tmp_path / "stand-in").write_text(STAND_IN)
    (tmp_path / "stand-in").chmod(0o755)
    return tmp_path


def make(
    project: Path, lock: str = "constraints.txt", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Create the environment `made` with the project in it, as the scripts do."""
    command = f'set -euo pipefail; source "{SCRIPT}"; make_environment made "{lock}" --editable .'
    environment = {"PATH": os.environ["PATH"], "PYTHON": "./stand-in", **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True
    )


def installs(project: Path) -> list[str]:
    """The calls of pip since the last call of this function."""
    log = project / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


def test_everything_comes_from_the_lock(project: Path) -> None:
    """The lock covers pip itself and the build requirements; a second run installs nothing."""
    assert make(project).returncode == 0
    pip, rest = installs(project)
    assert pip.endswith("--upgrade --constraint constraints.txt pip")
    locked = "--constraint constraints.txt --build-constraint constraints.txt --editable ."
    assert rest.endswith(locked)
    assert make(project).returncode == 0
    assert installs(project) == []


def test_without_a_lock_nothing_is_held_back(project: Path) -> None:
    """The newest versions are installed, and again on another day."""
    assert make(project, lock="").returncode == 0
    assert not [line for line in installs(project) if "constraint" in line]
    assert make(project, lock="").returncode == 0
    assert installs(project) == []
    stamp = project / "made" / "installed"
    stamp.write_text("1999-12-31" + stamp.read_text()[len("1999-12-31") :])
    assert make(project, lock="").returncode == 0
    assert len(installs(project)) == 2


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_what_is_out_of_date_is_made_anew(project: Path, file: str) -> None:
    """A change of the project file or of the lock rebuilds the environment."""
    make(project)
    installs(project)
    with (project / file).open("a") as out:
        out.write("# more\n")
    make(project)
    assert len(installs(project)) == 2


def test_another_python_or_folder_is_another_environment(project: Path) -> None:
    """An environment contains its path, and packages for one version of Python."""
    make(project)
    installs(project)
    make(project, SAYS="3.13.0")
    assert len(installs(project)) == 2
    moved = project.rename(project.with_name("moved"))
    make(moved, SAYS="3.13.0")
    assert len(installs(moved)) == 2


def test_an_install_that_failed_is_not_taken_for_done(project: Path) -> None:
    """A failed install invalidates the environment, whatever it contained before."""
    make(project)
    (project / "constraints.txt").write_text("numpy==2.4.7\n")
    assert make(project, PIP_FAILS="1").returncode != 0
    (project / "constraints.txt").write_text("numpy==2.4.6\n")
    installs(project)
    make(project)
    assert len(installs(project)) == 2


def test_the_python_that_was_asked_for_or_none(project: Path) -> None:
    """The error names a Python that is too old, and no other is used instead."""
    result = make(project, TOO_OLD="1")
    assert result.returncode != 0
    assert result.stderr == (
        'Python 3.11 or newer is needed, and "./stand-in" is not; set PYTHON to one.\n'
    )
    assert installs(project) == []


def test_a_real_python_will_do(project: Path) -> None:
    """The Python that runs this test is accepted."""
    command = f'source "{SCRIPT}"; find_python'
    found = subprocess.run(
        ["bash", "-c", command], env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == sys.executable


NPM = """#!/bin/sh
test "$1" = pack && test -n "$PACKS" && echo anything > "$PACKS" && echo "$PACKS"
"""


def fetch_llama(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script that fetches llama.cpp, with only the programs of a folder."""
    programs = project / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "mkdir", "rm", "sha512sum", "tail"):
        (programs / name).symlink_to(str(shutil.which(name)))
    (programs / "uname").write_text("#!/bin/sh\necho Linux x86_64\n")
    (programs / "uname").chmod(0o755)
    (project / "scripts").mkdir(exist_ok=True)
    script = shutil.copy(ROOT / "scripts" / "llama.sh", project / "scripts" / "llama.sh")
    if environment:
        (programs / "npm").write_text(NPM)
        (programs / "npm").chmod(0o755)
    environment = {"PATH": str(programs), **environment}
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "npm is not installed"),
        ({"PACKS": ""}, "npm could not fetch @node-llama-cpp/linux-x64"),
        ({"PACKS": "other.tgz"}, "other.tgz has another checksum"),
    ],
)
def test_llama_cpp_is_the_pinned_one_or_none(
    project: Path, environment: dict[str, str], why: str
) -> None:
    """The script prints the reason on one line, and leaves nothing that counts as fetched."""
    result = fetch_llama(project, **environment)
    said = f"llama.sh: {why}; the tests that need llama.cpp are skipped\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", said)
    assert not list(project.glob(".llama-client/[0-9]*"))


def test_the_tests_go_on_without_llama_cpp() -> None:
    """The test script tries to fetch it, and continues without it."""
    lines = (ROOT / "scripts" / "test.sh").read_text().splitlines()
    (line,) = (line for line in lines if "llama.sh" in line)
    assert line.strip().startswith("scripts/llama.sh > /dev/null || true ")


def test_the_demo_installs_what_it_imports() -> None:
    """The tests have more libraries than a user, so a missing one would go unnoticed there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "scripts" / "demo.sh").read_text().splitlines()
    command = next(line for line in lines if line.startswith("make_environment"))
    asked = [*project["dependencies"], *shlex.split(command)[4:]]
    installed = {re.split(r"[<>=\[; ]", name)[0].replace("-", "_") for name in asked}
    tree = ast.parse((ROOT / "scripts" / "demo.py").read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
    }
    assert imported - sys.stdlib_module_names <= installed


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]
