"""Files are written whole or not at all."""

from __future__ import annotations

import json

import pytest
from finegrid.files import whole, write_json, write_text


def test_text_and_json_come_back_and_folders_are_made(tmp_path):
    write_text(tmp_path / "a/b.txt", "问题 – question")
    write_json(tmp_path / "a/c.json", {"question": "问题"})
    assert (tmp_path / "a/b.txt").read_text(encoding="utf-8") == "问题 – question"
    assert json.loads((tmp_path / "a/c.json").read_text(encoding="utf-8")) == {"question": "问题"}
    assert "问题" in (tmp_path / "a/c.json").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.txt", "c.json"]


def interrupted(path):
    with whole(path) as half:
        half.write_text("half of it")
        raise KeyboardInterrupt


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"runs": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"runs": float("nan")})
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert json.loads(path.read_text()) == {"runs": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
