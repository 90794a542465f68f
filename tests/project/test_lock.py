"""The lock pins one version of everything that the scripts install, for every system."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
LOCKED = [
    Requirement(line.partition("#")[0]) for line in LINES if not line.lstrip().startswith("#")
]

SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
]
MACHINES = {"linux": ("x86_64", "aarch64"), "darwin": ("arm64",), "win32": ("AMD64",)}
ENVIRONMENTS = [
    system | {"platform_machine": machine, "python_version": python, "python_full_version": python}
    for system in SYSTEMS
    for machine in MACHINES[system["sys_platform"]]
    for python in ("3.11", "3.12", "3.13", "3.14")
]


def asked() -> list[Requirement]:
    """All requirements in pyproject.toml: of the package, its extras, its groups and its build."""
    project = PROJECT["project"]
    lists = [
        ["pip"],
        PROJECT["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
    ]
    return [Requirement(line) for lines in lists for line in lines]


@pytest.mark.parametrize("requirement", asked(), ids=str)
def test_what_is_asked_for_is_locked(requirement: Requirement) -> None:
    """Each has a pinned version within its bounds, on every system and Python."""
    name = canonicalize_name(requirement.name)
    for environment in ENVIRONMENTS:
        (locked,) = (
            line
            for line in LOCKED
            if canonicalize_name(line.name) == name
            and (line.marker is None or line.marker.evaluate(environment))
        )
        (pin,) = locked.specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version, prereleases=True)


def test_the_pythons_are_named_once_and_alike() -> None:
    """The classifiers list the Python versions of the lock."""
    prefix = "Programming Language :: Python :: 3."
    named = [line for line in PROJECT["project"]["classifiers"] if line.startswith(prefix)]
    pythons = " ".join(f"3.{line.removeprefix(prefix)}" for line in named)
    assert f'PYTHONS="{pythons}"' in (ROOT / "scripts" / "lock.sh").read_text()
    assert PROJECT["project"]["requires-python"] == f">={pythons.split()[0]}"


def test_a_line_is_a_version_and_nothing_else() -> None:
    """No line depends on one index or one file: no address, no hash, no option."""
    for line in LOCKED:
        (pin,) = line.specifier
        assert (pin.operator, line.url, line.extras) == ("==", None, set()), line
        assert "+" not in pin.version, line  # a local version exists on one index only
    text = "\n".join(LINES)
    assert not [word for word in ("://", "--hash", "--index", " @ ") if word in text]
