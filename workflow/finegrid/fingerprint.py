"""Content hashes: of settings, of files, and of a stage's code.

A run's id is a hash of its settings; a stage's code enters Snakemake's ``params`` as the fingerprint of its import
closure inside the package, so that a changed line of logic reruns what it touches and a comment reruns nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "finegrid"
ROOT = Path(__file__).resolve().parent
# Parsing and dumping the whole package takes about a second, and every Slurm job reads the Snakefile again: what a
# source file's content comes to is remembered beside the byte code, under the content's hash.
CACHE = ROOT / "__pycache__" / "fingerprints.json"
VERSION = 1


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no white space; ``2.0`` is written as ``2``, since YAML may give either.

    Raises:
        ValueError: a number is not finite.
        TypeError: something is not plain data.
    """
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def short_hash(value: Any) -> str:
    """Return the first 8 hex digits of the SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:8]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_fingerprint(module: str, files: Iterable[str] = ()) -> str:
    """Return 16 hex digits of a module's code and all code of the package that it imports.

    Comments, docstrings, formatting and imports under ``if TYPE_CHECKING:`` do not count; imports inside functions do.

    Args:
        module: dotted name, such as ``finegrid.training.train``.
        files: further files that count, relative to the package (templates, data tables), by content.

    Raises:
        ModuleNotFoundError: the module is not in the package.
    """
    digests = {name: _source(name)[0] for name in import_closure(module)}
    digests |= {f"file:{name}": file_hash(ROOT / name) for name in files}
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()[:16]


def import_closure(module: str) -> list[str]:
    """Return the module and all modules of the package that it imports, however deep, sorted.

    Raises:
        ModuleNotFoundError: the module is not in the package.
    """
    if _module_file(module) is None:
        raise ModuleNotFoundError(f"no module '{module}' in {PACKAGE}")
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or _module_file(name) is None:
            continue
        found.add(name)
        waiting += _source(name)[1]
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # Python runs the packages around a module first
    return sorted(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _module_file(name: str) -> Path | None:
    package, *rest = name.split(".")
    if package != PACKAGE:
        return None
    path = ROOT.joinpath(*rest)
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def _source(name: str) -> tuple[str, list[str]]:
    """Return a module's digest and the names it may import from the package."""
    path = _module_file(name)
    content = path.read_bytes()
    known = _known_sources()
    key = hashlib.sha256(f"{VERSION} {name} ".encode() + content).hexdigest()
    if key not in known:
        tree = ast.parse(content, filename=str(path))
        _strip(tree)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        known[key] = (hashlib.sha256(ast.dump(tree).encode()).hexdigest(), sorted(_imports(tree, package)))
        _remember(known)
    return known[key]


@cache
def _known_sources() -> dict[str, tuple[str, list[str]]]:
    try:
        known = json.loads(CACHE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict) -> None:
    while len(known) > 1000:  # of old versions of the files
        del known[next(iter(known))]
    temporary = CACHE.with_suffix(f".{os.getpid()}")
    try:
        CACHE.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        os.replace(temporary, CACHE)
    except OSError:
        pass  # an installation that can't be written to is slower, not wrong


def _strip(tree: ast.Module) -> None:
    """Take docstrings and blocks for the type checker out of a syntax tree, in place."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        node.body = [child for child in body if not _for_type_checker(child)]


def _for_type_checker(node: ast.AST) -> bool:
    if not isinstance(node, ast.If) or node.orelse:
        return False
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
    return name == "TYPE_CHECKING"


def _imports(tree: ast.Module, package: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                around = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*around, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}
