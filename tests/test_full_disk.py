"""A disk without room: the error names the file and its size, and what was there before is whole.

The limit on the size of files stands in for the disk: the system refuses writes in the same way.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fasterase
from fasterase.engine.history import HistoryFile, StepRecord, read_history
from fasterase.errors import DiskFullError, FaseraseError, InputError
from fasterase.files import check_writable, replace_file, replace_folder, write_text
from tests.marks import SHORT_RUN
from tests.test_files import names_in
from tests.tiny_model import TinyModel, erase, same_weights, unchanged

resource = pytest.importorskip("resource", reason="the limit exists on Unix only")


@contextmanager
def small_files(size: int | None = None) -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond `size` bytes in the block, or beyond what the yielded function sets.

    Not a fixture, which ends only after the test is reported: the report may go to a larger file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        if size is not None:
            limit(size)
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_tensors(file: Path) -> None:
    save_file({"a": torch.zeros(1000)}, file)


@pytest.mark.parametrize(
    "write",
    [
        save_tensors,
        lambda file: torch.save({"a": torch.zeros(1000)}, file),
        lambda file: file.write_bytes(b"x" * 4000),
    ],
)
def test_any_writer_on_a_full_disk(tmp_path, write):
    path = write_text(tmp_path / "file", "old")
    named = r"File too large: .*file cannot be written, it takes 4\.00kB\. .* unchanged"
    with (
        small_files(2000),
        pytest.raises(DiskFullError, match=named),
        replace_file(path, size_bytes=4000) as temporary,
    ):
        write(temporary)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]
    assert issubclass(DiskFullError, OSError)
    assert issubclass(fasterase.DiskFullError, FaseraseError)


def test_a_folder_on_a_full_disk(tmp_path):
    def fill() -> None:
        with replace_folder(tmp_path / "step-1") as new:
            (new / "small").write_text("fits")
            save_tensors(new / "large")

    with small_files(2000), pytest.raises(DiskFullError, match="step-1 cannot be written"):
        fill()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, ""), os.strerror(errno.ENOSPC) + r".*, \d.* are free\."),
        (OSError(errno.EDQUOT, ""), os.strerror(errno.EDQUOT) + r".*written\."),
        (RuntimeError("of another kind"), "^of another kind$"),
    ],
)
def test_only_a_full_disk_is_blamed_in_the_system_s_words(tmp_path, error, named):
    kind = DiskFullError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(kind, match=named), replace_file(tmp_path / "file"):
        raise error


def test_a_line_of_the_history_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "history.jsonl"
    history = HistoryFile(path, keep_steps=0)
    history.append(StepRecord(step=1, total=0.5))
    size = path.stat().st_size + 5
    with small_files(size), pytest.raises(DiskFullError, match=r"history\.jsonl"):
        history.append(StepRecord(step=2, total=0.5))
    assert path.read_bytes().endswith(b"}\n")
    assert [record.step for record in read_history(path)] == [1]


@SHORT_RUN
def test_a_run_keeps_its_last_checkpoint_and_goes_on_when_there_is_room(tmp_path):
    options = {"max_steps": 4, "save_every": 1, "output_dir": tmp_path}

    def run_until_full() -> None:
        with small_files() as limit:

            def fill(record):
                if record.step == 3:
                    limit((tmp_path / "history.jsonl").stat().st_size + 10)

            erase(**options, callback=fill)

    with pytest.raises(DiskFullError, match=r"step-000000003 cannot be written, it takes \d"):
        run_until_full()
    assert names_in(tmp_path / "checkpoints") == ["step-000000001", "step-000000002"]
    resumed, whole = TinyModel(), TinyModel()
    erase(resumed, **options, resume="must")
    erase(whole, max_steps=4)
    assert same_weights(resumed.weights(), whole.weights())


@SHORT_RUN
def test_the_cache_on_a_full_disk(tmp_path):
    tower = TinyModel()
    raises = pytest.raises(DiskFullError, match=r"\.safetensors cannot be written")
    with unchanged(tower.module), small_files(100), raises:
        erase(tower, reference_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_file_in_the_way(tmp_path):
    """Tests may run as root, whom permissions do not stop; a file in the way stops anybody."""
    (tmp_path / "file").touch()
    named = r"report\.md cannot be written \((File exists|Not a directory)\)"
    with pytest.raises(InputError, match=named):
        write_text(tmp_path / "file" / "report.md", "text")


@pytest.mark.parametrize("argument", ["output_dir", "reference_cache"])
def test_a_folder_that_takes_no_files(tmp_path, monkeypatch, argument):
    plain = tempfile.TemporaryFile

    def refuse(*args, dir, **options):
        if Path(dir).name == "locked":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    named = f"{argument}: .*locked cannot be written to .Read-only file system"
    with pytest.raises(InputError, match=named):
        check_writable(tmp_path / "locked", argument=argument)
    with pytest.raises(InputError, match=named):
        erase(**{argument: tmp_path / "locked"})
