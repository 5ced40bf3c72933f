"""Write files and folders atomically: readers see the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasterase.errors import InputError

# Marks a folder as a model that fasterase saved and may replace; names the library that loads it.
MARKER = "fasterase.json"

_STAGE_SUFFIX = ".partial"


@contextmanager
def replace_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` if the block succeeds.

    The temporary file has the same name as `path`, in a hidden folder beside it, so writers that
    choose the format by the suffix see the right one. Missing parent folders are created. After an
    error `path` is unchanged and nothing is left behind; after a kill see `remove_leftovers`.

    Args:
        sync: flush the content to disk before the rename, so that a power cut cannot leave an
            empty or truncated file under the final name.
    """
    with _staging_folder(path) as stage:
        temporary = stage / path.name
        yield temporary
        if sync:
            _flush_to_disk(temporary)
        os.replace(temporary, path)


@contextmanager
def replace_folder(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a new empty folder to fill, and rename it to `path` if the block succeeds.

    An existing folder is removed only once the new one has taken its place. Otherwise as
    `replace_file`.
    """
    with _staging_folder(path) as stage:
        new = stage / path.name
        new.mkdir()
        yield new
        if sync:
            for file in new.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
        _swap(new, path, replaced=stage / f"{path.name}.replaced")


@contextmanager
def replace_model_folder(folder: str | os.PathLike[str], *, library: str) -> Iterator[Path]:
    """`replace_folder` for a saved model: refuse foreign folders, and mark the new one as ours.

    Args:
        library: the library that loads the model, recorded in the marker file.

    Raises:
        InputError: `folder` is a file, or holds anything but a model saved by fasterase.
    """
    target = Path(folder).expanduser().absolute()
    check_replaceable(target)
    with replace_folder(target) as new:
        yield new
        (new / MARKER).write_text(json.dumps({"saved_by": "fasterase", "library": library}) + "\n")


def check_replaceable(target: Path, *, argument: str = "folder") -> None:
    """Raise `InputError` if saving a model to `target` would replace files of somebody else.

    Args:
        argument: the name of the argument that `target` comes from, for the message.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{argument}: {target} is a file; name a folder to save the model in")
    if any(target.iterdir()) and not (target / MARKER).is_file():
        raise InputError(
            f"{argument}: {target} holds files that fasterase did not write, and saving would "
            "replace them; name a new or empty folder"
        )


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically, as UTF-8, and return `path`."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`.

    Call it only where no other process can be writing to `folder`: it would lose its unfinished
    files.
    """
    for stage in folder.glob(f".*{_STAGE_SUFFIX}"):
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder on the file system of `target`, and remove it in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGE_SUFFIX, dir=target.parent)
    try:
        yield Path(stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _swap(new: Path, target: Path, *, replaced: Path) -> None:
    """Rename `new` to `target`, moving an existing `target` to `replaced` first.

    A folder that is not empty cannot be renamed over.
    """
    if not target.exists():
        new.rename(target)
        return
    target.rename(replaced)
    try:
        new.rename(target)
    except OSError:
        replaced.rename(target)
        raise
