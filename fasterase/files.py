"""Write files and folders atomically: readers see the old content or the new, never a part."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import FileIO
from pathlib import Path

from tqdm import tqdm

from fasterase.errors import DiskFullError, FaseraseError, InputError

# Marks a folder as a model that fasterase saved and may replace; names the library that loads it.
MARKER = "fasterase.json"

_STAGE_SUFFIX = ".partial"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE_BYTES = 1 << 20


@contextmanager
def replace_file(
    path: Path, *, sync: bool = False, size_bytes: int | None = None
) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` if the block succeeds.

    The temporary file has the same name as `path`, so that writers which choose the format by the
    suffix see the right one. Missing parent folders are created. After an error `path` is unchanged
    and nothing is left behind; after a kill see `remove_leftovers`.

    `sync` flushes the content to disk before the rename, and the folder with its name after it, so
    that a power cut can neither leave a truncated file under that name nor take it back.
    `size_bytes` is what will be written, if known, for the message of `DiskFullError`.

    Raises:
        InputError: the folder cannot be made or written to.
        DiskFullError: there is no room for the content.
    """
    with _staging_folder(path, size_bytes) as stage:
        temporary = stage / path.name
        yield temporary
        if sync:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            flush_to_disk(path.parent)


@contextmanager
def replace_folder(
    path: Path, *, sync: bool = False, size_bytes: int | None = None
) -> Iterator[Path]:
    """`replace_file` for a new folder to fill; an old one is removed once it has its place."""
    with _staging_folder(path, size_bytes) as stage:
        new = stage / path.name
        new.mkdir()
        yield new
        for file in [*new.rglob("*"), new]:
            if file.is_file():
                # safetensors lets the owner alone read its files, whatever the umask allows.
                file.chmod(file.stat().st_mode | (new.stat().st_mode & 0o666))
            if sync:
                flush_to_disk(file)
        # A folder that is not empty cannot be renamed over.
        replaced = stage / f"{path.name}.replaced"
        try:
            if path.exists():
                path.rename(replaced)
            new.rename(path)
        except BaseException:  # of a signal, too
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise
        if sync:
            flush_to_disk(path.parent)


@contextmanager
def replace_model_folder(folder: str | os.PathLike[str], *, library: str) -> Iterator[Path]:
    """`replace_folder` for a model that `library` loads; see `check_replaceable`."""
    target = Path(folder).expanduser().absolute()
    check_replaceable(target)
    with replace_folder(target, sync=True) as new:
        yield new
        (new / MARKER).write_text(json.dumps({"saved_by": "fasterase", "library": library}) + "\n")


def check_replaceable(target: Path, *, argument: str = "folder") -> None:
    """Raise `InputError`, which names `argument`, if a model in `target` would replace files."""
    exists = os.path.exists(target)
    if exists and not target.is_dir():
        raise InputError(f"{argument}: {target} is a file; name a folder to save the model in")
    if exists and any(target.iterdir()) and not (target / MARKER).is_file():
        raise InputError(
            f"{argument}: {target} holds files that fasterase did not write, and saving would "
            "replace them; name a new or empty folder"
        )


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically and to disk, as UTF-8, and return `path`."""
    data = text.encode()
    with replace_file(path, sync=True, size_bytes=len(data)) as temporary:
        temporary.write_bytes(data)
    return path


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return `value` as JSON; numbers that are not finite, for which JSON has no word, are null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, indent=indent)


def append_whole(file: FileIO, data: bytes, *, path: Path) -> None:
    """Append all of `data` to an unbuffered file, or nothing and raise `DiskFullError`."""
    end = file.seek(0, os.SEEK_END)
    written = 0
    try:
        while written < len(data):
            written += file.write(data[written:])
    except OSError as error:
        file.truncate(end)
        if error.errno not in _FULL:
            raise
        raise _full_disk_error(path, error.errno, end + len(data), written) from error


def parse_path(value: object, *, argument: str) -> Path:
    """Return a str or `os.PathLike` as a path without `~`; `InputError` for anything else."""
    try:
        return Path(os.path.expanduser(value))  # type: ignore[call-overload]
    except TypeError as error:
        raise InputError(
            f"{argument}: expected a path, found {type(value).__name__}. Give it as a str or Path."
        ) from error


def check_writable(folder: Path, *, argument: str) -> None:
    """Create `folder` and write to it, or raise `InputError`: better now than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        action = "written to" if folder.is_dir() else "created"
        raise InputError(
            f"{argument}: {folder} cannot be {action} ({error.strerror}). Give another path."
        ) from error


def check_creatable(folder: Path, *, argument: str) -> None:
    """Raise `InputError` if `folder` could not be created and written to, without creating it."""
    folder = folder.absolute()
    # Not the path's own methods, which raise where they may not look.
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.path.isdir(nearest):
        raise InputError(
            f"{argument}: {nearest} is not a folder, and {folder} cannot be created. Give another "
            "path."
        )
    check_writable(nearest, argument=argument)


def crc32(file: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`, where no other one writes now."""
    for stage in folder.glob(f".*{_STAGE_SUFFIX}"):
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _staging_folder(target: Path, size_bytes: int | None) -> Iterator[Path]:
    """Make a hidden folder on the file system of `target`, and remove it in the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGE_SUFFIX, dir=target.parent)
        )
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}). Give a folder that can be written to."
        ) from error
    try:
        with reporting_full_disk(stage, target=target, size_bytes=size_bytes):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def reporting_full_disk(
    stage: Path, *, target: Path, size_bytes: int | None = None
) -> Iterator[None]:
    """Raise `DiskFullError` for errors of a full disk, while `target` is written below `stage`."""
    try:
        yield
    except FaseraseError:
        raise
    except Exception as error:
        number = _full_disk_number(error, stage)
        if number is None:
            raise
        written = sum(file.stat().st_size for file in stage.rglob("*") if file.is_file())
        raise _full_disk_error(target, number, size_bytes, written) from error


def _full_disk_number(error: Exception, stage: Path) -> int | None:
    """Return the system's number of an error that a full disk raised; None for any other."""
    # safetensors raises an error of its own, which quotes the system's. torch does not even that,
    # but leaves what it has written, so that the disk is still full.
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    if not isinstance(error, OSError) and quoted is None:
        try:
            (stage / "probe").write_bytes(bytes(_PROBE_BYTES))
        except OSError as full:
            error = full
        finally:
            (stage / "probe").unlink(missing_ok=True)
    number = error.errno if isinstance(error, OSError) else quoted and int(quoted[1])
    return number if number in _FULL else None


def _full_disk_error(
    target: Path, number: int, size_bytes: int | None, written_bytes: int
) -> DiskFullError:
    """Return the error that names the file, its size and the room there is for it."""
    facts = f"{target} cannot be written"
    if size_bytes is not None:
        facts += f", it takes {tqdm.format_sizeof(size_bytes, 'B')}"
    if number == errno.ENOSPC:  # of a quota, the system does not tell what is left
        free = shutil.disk_usage(target.parent).free + written_bytes
        facts += f", {tqdm.format_sizeof(free, 'B')} are free"
    return DiskFullError(
        f"{os.strerror(number)}: {facts}. What was there before is unchanged. Free some space, or "
        "choose another folder, and start again."
    )


def flush_to_disk(path: Path) -> None:
    """Wait until what a file holds, or the names in a folder, cannot be lost by a power cut.

    Not every system can wait for names.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
