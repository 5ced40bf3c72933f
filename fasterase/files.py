"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasterase.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` on leaving without an error.

    The suffix stays, for writers that choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8; returns `path`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


# Marks a folder as ours to replace, and says which library reads it.
MARKER = "fasterase.json"


@contextmanager
def written_whole(folder: str | os.PathLike[str], *, library: str) -> Iterator[Path]:
    """A new folder beside `folder` to write into; on leaving without an error it takes its name.

    Raises:
        InputError: `folder` is a file, or holds anything but a model saved by fasterase.
    """
    target = Path(folder).expanduser().absolute()
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        # mkdtemp gives 0700; a model folder is as readable as any other folder the user makes.
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        yield new
        (new / MARKER).write_text(json.dumps({"saved_by": "fasterase", "library": library}) + "\n")
        _swap(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """`InputError` where saving to `target` would replace what fasterase did not write."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"folder: {target} is a file; name a folder to save the model in")
    if any(target.iterdir()) and not (target / MARKER).is_file():
        raise InputError(
            f"folder: {target} holds files that fasterase did not write, and saving would replace "
            "them; name a new or empty folder"
        )


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    # A non-empty folder cannot be renamed over: the old one steps aside first, and goes last.
    old = new.with_name(new.name.replace(".new-", ".old-", 1))
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
