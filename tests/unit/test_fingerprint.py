"""Content hashes: equal where nothing that matters changed, different where something did."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from finegrid import fingerprint
from finegrid.fingerprint import canonical_json, code_fingerprint, file_hash, import_closure, short_hash

FILES = {
    "__init__.py": '"""A package."""\n',
    "errors.py": "class UserError(Exception):\n    pass\n",
    "helper.py": "from finegrid.errors import UserError\n\n\ndef half(x):\n    return x / 2\n",
    "settings.py": "LIMIT = 3\n",
    "data/__init__.py": "",
    "data/clean.py": (
        '"""Cleans."""\n'
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from ..errors import UserError\n"
        "if TYPE_CHECKING:\n"
        "    from finegrid.settings import LIMIT\n"
        "\n"
        "# how it is done\n"
        "def clean(rows: list[LIMIT]):\n"
        '    """Clean rows."""\n'
        "    from finegrid import helper\n"
        "    return [helper.half(row) for row in rows]\n"
    ),
    "data/other.py": "from . import clean\nVALUE = 1\n",
    "data/template.html": "<p>",
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    monkeypatch.setattr(fingerprint, "CACHE", tmp_path / "__pycache__/fingerprints.json")
    fingerprint._known_sources.cache_clear()
    yield tmp_path
    fingerprint._known_sources.cache_clear()


def edit(package: Path, name: str, old: str, new: str) -> None:
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new))


def test_the_closure_has_relative_nested_and_function_imports_but_none_for_the_type_checker(package):
    assert import_closure("finegrid.data.clean") == [
        "finegrid", "finegrid.data", "finegrid.data.clean", "finegrid.errors", "finegrid.helper"
    ]  # fmt: skip
    assert "finegrid.data.clean" in import_closure("finegrid.data.other")
    assert import_closure("finegrid.settings") == ["finegrid", "finegrid.settings"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data/clean.py", "# how it is done\n", "# another comment\n\n\n"),
        ("data/clean.py", '"""Clean rows."""', '"""Clean the rows\n\n    at length.\n    """'),
        ("data/clean.py", '"""Cleans."""\n', ""),
        ("data/clean.py", "helper.half(row) for", "helper.half( row )  for"),
        ("data/clean.py", "import LIMIT", "import LIMIT as LIMIT, OTHER"),
        ("__init__.py", "A package", "The package"),
        ("settings.py", "3", "4"),
        ("data/other.py", "1", "2"),
        ("data/template.html", "<p>", "<b>"),
    ],
)
def test_what_changes_no_logic_of_the_stage_changes_no_fingerprint(package, name, old, new):
    before = code_fingerprint("finegrid.data.clean")
    edit(package, name, old, new)
    assert code_fingerprint("finegrid.data.clean") == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data/clean.py", "half(row)", "half(row + 1)"),
        ("helper.py", "x / 2", "x / 3"),
        ("errors.py", "pass", "code = 1"),
        ("data/__init__.py", "", "START = 1\n"),
        ("__init__.py", '"""A package."""', "START = 1"),
    ],
)
def test_a_changed_line_of_logic_changes_the_fingerprint_of_all_that_import_it(package, name, old, new):
    stages = ("finegrid.data.clean", "finegrid.data.other")
    before = [code_fingerprint(stage) for stage in stages]
    edit(package, name, old, new) if old else (package / name).write_text(new)
    after = [code_fingerprint(stage) for stage in stages]
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_a_touched_or_moved_package_keeps_its_fingerprint(package, tmp_path_factory, monkeypatch):
    before = code_fingerprint("finegrid.data.other")
    moved = tmp_path_factory.mktemp("moved")
    for name, text in reversed(FILES.items()):  # other order, other times
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_text(text)
    monkeypatch.setattr(fingerprint, "ROOT", moved)
    assert code_fingerprint("finegrid.data.other") == before


def test_data_files_count_where_they_are_named(package):
    plain = code_fingerprint("finegrid.data.clean")
    with_file = code_fingerprint("finegrid.data.clean", files=["data/template.html"])
    (package / "data/template.html").write_text("<b>")
    assert plain == code_fingerprint("finegrid.data.clean") != with_file
    assert code_fingerprint("finegrid.data.clean", files=["data/template.html"]) != with_file


def test_a_broken_cache_is_only_slower(package):
    before = code_fingerprint("finegrid.data.clean")
    for content in ("{", '["x"]'):
        fingerprint.CACHE.write_text(content)
        fingerprint._known_sources.cache_clear()
        assert code_fingerprint("finegrid.data.clean") == before


def test_a_module_that_is_not_there_is_told():
    with pytest.raises(ModuleNotFoundError, match=r"finegrid\.nothing"):
        code_fingerprint("finegrid.nothing")


def test_stages_do_not_import_the_settings_nor_each_other_against_the_way_of_the_data():
    # An edit of settings.py must not train anything again.
    above = {"settings", "study", "cli", "plan", "values", "yaml_file", "library_keys"}
    root = Path(fingerprint.__file__).parent
    order = ["data", "training", "evaluation", "analysis"]
    for number, stage in enumerate(order):
        for path in sorted((root / stage).glob("*.py")):
            module = f"finegrid.{stage}.{path.stem}".removesuffix(".__init__")
            parts = {name.split(".")[1] for name in import_closure(module) if "." in name}
            assert not parts & above, module
            assert not parts & set(order[number + 1 :]), module


def test_canonical_json_forgets_order_white_space_and_whole_floats():
    assert canonical_json({"b": [1.0, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert short_hash({"a": 1, "b": 2}) == short_hash({"b": 2.0, "a": 1.0})
    assert short_hash({"a": "1"}) != short_hash({"a": 1})
    assert short_hash({"a": True}) != short_hash({"a": 1})
    assert json.loads(canonical_json({"frage": "wie teuer ist's? 你好"})) == {"frage": "wie teuer ist's? 你好"}


def test_short_hash_is_the_start_of_sha256_of_the_canonical_json():
    assert short_hash({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:8]


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": {1, 2}}])
def test_what_is_no_plain_data_has_no_hash(value):
    with pytest.raises((ValueError, TypeError)):
        short_hash(value)


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
