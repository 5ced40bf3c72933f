"""Atomic writes: all or nothing, on success, on an error and after a kill."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fasterase.files import (
    remove_leftovers,
    replace_file,
    replace_folder,
    replace_model_folder,
    write_text,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_text_makes_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep" / "report.md", "ä ↓\n")
    assert path.read_text(encoding="utf-8") == "ä ↓\n"
    assert names_in(path.parent) == ["report.md"]


def test_an_error_while_writing_keeps_the_old_file_and_the_old_folder(tmp_path: Path) -> None:
    path = write_text(tmp_path / "report.md", "old")
    with replace_folder(tmp_path / "step-1") as new:
        (new / "old").touch()

    def fail(replace: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
        with replace(path) as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            raise RuntimeError

    for replace, name in ((replace_file, "report.md"), (replace_folder, "step-1")):
        with pytest.raises(RuntimeError):
            fail(replace, tmp_path / name)
    assert path.read_text() == "old"
    assert names_in(tmp_path / "step-1") == ["old"]
    assert names_in(tmp_path) == ["report.md", "step-1"]


def test_the_temporary_file_has_the_final_name_and_no_glob_of_it_matches(tmp_path: Path) -> None:
    with replace_file(tmp_path / "weights.tar.gz") as temporary:
        assert temporary.name == "weights.tar.gz"
        assert list(tmp_path.glob("*.gz")) == []
        temporary.touch()
    assert names_in(tmp_path) == ["weights.tar.gz"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_those_of_any_new_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "written", "")
    with replace_folder(tmp_path / "replaced"):
        pass
    assert mode(tmp_path / "written") == mode(tmp_path / "file")
    assert mode(tmp_path / "replaced") == mode(tmp_path / "folder")


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step-1"
    for name in ("first", "second"):
        with replace_folder(target) as new:
            (new / name).write_text(name)
            assert not (target / name).exists()
        assert names_in(target) == [name]
    assert names_in(target.parent) == ["step-1"]


def test_a_folder_that_cannot_be_put_in_place_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "step-1"
    with replace_folder(target) as new:
        (new / "old").touch()
    rename = Path.rename

    def refuse_new(self: Path, to: Path) -> Path:
        if self.name == target.name and self.parent != tmp_path:
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="no"), replace_folder(target) as new:
        (new / "new").touch()
    assert names_in(target) == ["old"]
    assert names_in(tmp_path) == ["step-1"]

    def interrupt(self: Path, to: Path) -> Path:
        if self == target:
            monkeypatch.setattr(Path, "rename", rename)
            rename(self, to)
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt), replace_folder(target) as new:
        (new / "new").touch()
    assert names_in(target) == ["old"]


def test_sync_flushes_files_before_and_folders_after_they_take_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []
    target = tmp_path / "folder"

    def record(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))

    monkeypatch.setattr(os, "fsync", record)
    write_text(tmp_path / "file", "c")
    with replace_model_folder(target, library="x") as new:
        (new / "deep").mkdir()
        (new / "deep" / "a").write_text("a")
    with replace_file(tmp_path / "unsynced") as temporary:
        temporary.write_text("d")
    written = ("file", "", "folder", "folder/deep", "folder/deep/a", "folder/fasterase.json")
    expected = [(path.stat().st_ino, False) for path in map(tmp_path.joinpath, written)]
    assert sorted(flushed) == sorted([*expected, (tmp_path.stat().st_ino, True)])


def test_leftovers_of_a_kill_are_removed_on_request_and_the_old_file_is_whole(
    tmp_path: Path,
) -> None:
    path = write_text(tmp_path / "history.jsonl", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from fasterase.files import *\n"
        "with replace_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == ["history.jsonl"]
    assert path.read_text() == "old"


def test_files_of_a_new_folder_may_be_read_by_whom_the_umask_allows(tmp_path):
    with replace_folder(tmp_path / "model") as new:
        (new / "weights").touch(mode=0o600)
        (new / "tool").touch(mode=0o700)
    allowed = (tmp_path / "model").stat().st_mode & 0o666
    assert allowed & 0o444 == 0o444
    assert mode(tmp_path / "model" / "weights") == allowed | 0o600
    assert mode(tmp_path / "model" / "tool") == allowed | 0o700
