"""The lock pins every package, and the conda file carries the same pins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s;]+", line) for line in lines), "every line is name==version"
    return dict(line.split("==") for line in lines)


def test_conda_file_has_the_same_pins_as_the_lock(project):
    conda = yaml.safe_load((project / "envs/finegrid.yaml").read_text())
    packages = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert dict(line.split("==") for line in packages) == pins(project / "envs/lock.txt")


def test_every_declared_dependency_is_locked_at_a_version_it_allows(project):
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    files = {"lock": declared["dependencies"], "test": declared["optional-dependencies"]["test"]}
    files["demo"] = declared["optional-dependencies"]["demo"]
    for name, requirements in files.items():
        locked = pins(project / f"envs/{name}.txt")
        for requirement in map(Requirement, requirements):
            version = locked.get(canonicalize_name(requirement.name))
            assert version, f"{requirement.name} is missing from envs/{name}.txt"
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_the_three_locks_do_not_overlap(project):
    names = [set(pins(project / f"envs/{name}.txt")) for name in ("lock", "test", "demo")]
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]
