"""`finegrid add-data`: put a user's own files where data lies, check them, version them, and write a recipe for them.

The files are copied to ``data/raw/<name>/``, read as the import will read them, and put under DVC. The same command
with a changed file makes a new version of it: git then has another hash, Snakemake reruns what rests on the file, and
no run of the one version is compared to a run of the other.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finegrid import versions
from finegrid.errors import UserError
from finegrid.files import write_text
from finegrid.fingerprint import file_hash
from finegrid.settings import DataConfig

RAW = Path("data/raw")
RECIPES = Path("config/recipes")
SPLITS = {"train": "train_file", "validation": "val_file", "test": "test_file"}
NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test", "held")}
OPTIONS = {"data_config.columns": "--prompt NAME --answer NAME", "data_config.encoding": "--encoding NAME"}
SHARE = 0.1  # of the rows of train, split off where a split has no file
SECTION = re.compile(r"^data_config:\n(?:[ \t#].*\n|\n(?=[ \t]))*", re.MULTILINE)


def add_data(
    name: str,
    files: list[Path],
    given: dict[str, Path | None],
    reading: dict[str, Any],
    pattern: Path,
    say: Callable[[str], None] = print,
) -> None:
    """Add a data set, or a new version of its files.

    Args:
        name: of the data set: letters, digits, ``-``, ``_`` and ``.``.
        files: raw files; which split each is shows in its name (train, val, dev, test), and one alone is train.
        given: split -> file, where names don't tell.
        reading: what the files don't tell, under the names of ``data_config``: ``columns``, ``encoding``.
        pattern: recipe whose other settings the new recipe takes over.

    Raises:
        UserError: a file is missing, its split is unclear, its rows can't be read, there is no such recipe, or DVC
            refuses.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise UserError(f"add-data: '{name}' is no name of a data set; expected letters, digits, '-', '_' and '.'")
    if not Path(".dvc").is_dir():
        raise UserError("add-data: there is no .dvc here; expected a project under DVC (`dvc init`)")
    if not (RECIPES / f"{name}.yaml").is_file() and not pattern.is_file():
        raise UserError(f"add-data: there is no recipe {pattern}; expected one such as config/recipes/lora.yaml")
    sources = _splits(files, given)
    config = _config(name, sources, reading)
    report = _check(name, sources, config)
    for split, entries in report["files"].items():
        for entry in entries:
            say(f"add-data {name}: {split}: {entry['file']}, {entry['rows']:,} rows, {entry['format']}")
    placed = [_place(source, RAW / name / source.name, say) for source in sources.values()]
    versions.dvc("add", *placed)
    say(f"add-data {name}: under DVC: {', '.join(f'{path}.dvc' for path in placed)}; `dvc push` stores them")
    _recipe(name, config, pattern, say)


def _splits(files: list[Path], given: dict[str, Path | None]) -> dict[str, Path]:
    splits = {split: path for split, path in given.items() if path}
    problems = []
    for path in files:
        words = re.split(r"[^a-z]+", path.name.split(".")[0].lower())
        named = [split for split, known in NAMES.items() if set(words) & set(known)]
        split = named[0] if len(named) == 1 else "train" if len(files) == 1 and not splits else None
        if split is None:
            problems.append(
                f"add-data: {path}: no split shows in its name; expected train, validation or test in it, or "
                "`--train`, `--validation`, `--test` before the file"
            )
        elif split in splits:
            problems.append(f"add-data: {path}: {split} is {splits[split]} already; expected one file a split")
        else:
            splits[split] = path
    problems += [
        f"add-data: {path}: {'a folder; expected a file' if path.is_dir() else 'no such file'}"
        for path in splits.values()
        if not path.is_file()
    ]
    if not problems and "train" not in splits:
        problems.append("add-data: no file is train; expected one with train in its name, or `--train FILE`")
    names = [path.name for path in splits.values()]
    problems += [f"add-data: two files are named {one}" for one in {n for n in names if names.count(n) > 1}]
    if problems:
        raise UserError(*problems)
    return {split: splits[split] for split in SPLITS if split in splits}


def _config(name: str, sources: dict[str, Path], reading: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {SPLITS[split]: (RAW / name / path.name).as_posix() for split, path in sources.items()}
    for split in ("validation", "test"):
        if split not in sources:
            config[f"{split}_size"] = SHARE
    return config | reading


def _check(name: str, sources: dict[str, Path], config: dict[str, Any]) -> dict[str, Any]:
    """Read the files where they are as the import will, all rows of them; return its report."""
    from finegrid.data.importing import import_data

    here = config | {SPLITS[split]: path.resolve().as_posix() for split, path in sources.items()}
    settings = SimpleNamespace(data_config=DataConfig(**here), dataset_name=name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = import_data(settings, Path.cwd(), Path(folder) / "imported")
        except UserError as error:
            short = [_shown(problem, sources) for problem in error.problems]
            raise UserError(*short, *_options(short)) from None
    for (_, path), entries in zip(sources.items(), report["files"].values(), strict=False):
        for entry in entries:
            entry["file"] = path.as_posix()
    return report


def _options(problems: list[str]) -> list[str]:
    """Say which options set what the problems name by its key in a recipe, which isn't written yet."""
    named = [f"`{option}` sets {key}" for key, option in OPTIONS.items() if any(key in line for line in problems)]
    return [f"add-data: {', '.join(named)}"] if named else []


def _shown(problem: str, sources: dict[str, Path]) -> str:
    for path in sources.values():
        problem = problem.replace(path.resolve().as_posix(), path.as_posix())
    return problem


def _place(source: Path, target: Path, say: Callable[[str], None]) -> str:
    """Copy a file to where raw data lies, and say whether it is a new version of what lay there."""
    if target.is_file() and file_hash(target) != file_hash(source):
        say(f"add-data: {target}: a new version, {file_hash(source)[:12]} after {file_hash(target)[:12]}")
    if source.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.half")
        shutil.copyfile(source, half)
        half.replace(target)
    return target.as_posix()


def _recipe(name: str, config: dict[str, Any], pattern: Path, say: Callable[[str], None]) -> None:
    """Write the recipe, with the section ``data_config`` in the place of its pattern's; one that is there is left."""
    import yaml

    section = yaml.safe_dump({"data_config": config}, sort_keys=False, allow_unicode=True)
    path = RECIPES / f"{name}.yaml"
    if path.is_file():
        written = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data_config") or {}
        if config.items() <= written.items():
            say(f"add-data {name}: {path} names these files already")
        else:
            say(f"add-data {name}: {path} is there and names other files; for these it needs:\n{section.rstrip()}")
        return
    text = pattern.read_text(encoding="utf-8").replace(pattern.as_posix(), path.as_posix())
    text = SECTION.sub(lambda _: section, text, count=1) if SECTION.search(text) else f"{section}\n{text}"
    write_text(path, text)
    say(f"add-data {name}: {path} written, with the other settings of {pattern}; a study names it as `recipe: {path}`")
