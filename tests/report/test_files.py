from __future__ import annotations

from pathlib import Path

import pytest

from fasterase.files import replacing, write_text


def test_write_text_makes_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep" / "report.md", "ä ↓\n")
    assert path.read_text(encoding="utf-8") == "ä ↓\n"
    assert [p.name for p in path.parent.iterdir()] == ["report.md"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "report.md", "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
