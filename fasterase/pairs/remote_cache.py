"""Local copies of remote shards, within a bound: fetched whole, least recently used dropped first.

All processes of a machine share one folder. A shard is fetched by one of them while the others wait
for it; a download that was cut off goes on where it stopped. Its name is a hash of URL, size and
version, so a shard that changes on its server is another file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from filelock import FileLock, Timeout

from fasterase.errors import InputError
from fasterase.files import reporting_full_disk
from fasterase.pairs.remote import RemoteError, RemoteShard, download, shard_name

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that is open
    fcntl = None  # type: ignore[assignment]

FOLDER_VARIABLE = "FASTERASE_SHARD_CACHE"
BYTES_VARIABLE = "FASTERASE_SHARD_CACHE_BYTES"
DEFAULT_BYTES = 64 << 30
# Seconds for which a shard that could not be fetched counts as broken, before it is tried again.
_FAILED_SECONDS = 300.0
_POLL_SECONDS = 0.05


class _Held(NamedTuple):
    """A file of the cache: its last use, the bytes it takes or will take, its path."""

    used_ns: int
    size: int
    path: Path


class ShardCache:
    """A folder of whole shards.

    Args:
        folder: shared by all processes of this machine.
        max_bytes: bound of what it holds, unfinished downloads included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._failed: dict[str, tuple[float, str]] = {}

    @classmethod
    def of_environment(cls) -> ShardCache:
        """Return the cache that the environment names: `FASTERASE_SHARD_CACHE` is its folder,
        `FASTERASE_SHARD_CACHE_BYTES` its bound; by default 64 GiB in the user's cache folder.

        Raises:
            InputError: the bound is no number of bytes.
        """
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fasterase" / "remote"
        folder = Path(os.environ.get(FOLDER_VARIABLE) or cache).expanduser()
        bound = os.environ.get(BYTES_VARIABLE) or str(DEFAULT_BYTES)
        if not bound.isdecimal():
            raise InputError(
                f"{BYTES_VARIABLE}={bound!r} must be a whole number of bytes, such as "
                f"{DEFAULT_BYTES} for 64 GiB."
            )
        return cls(folder, int(bound))

    @contextlib.contextmanager
    def open(self, shard: RemoteShard) -> Iterator[IO[bytes]]:
        """Open a shard, fetched if need be; it is not dropped before the block ends.

        Raises:
            RemoteError: it cannot be fetched.
            InputError: it is larger than the cache, or the cache cannot be written.
            DiskFullError: there is no room for it.
        """
        path = self._path(shard)
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                self._fetch(shard, path)
                continue
            with file:
                if _hold(file):
                    os.utime(path)
                    yield file
                    return

    def _path(self, shard: RemoteShard) -> Path:
        key = hashlib.blake2b("\n".join(map(str, shard)).encode(), digest_size=12).hexdigest()
        return self.folder / f"{key}-{shard_name(shard.url)[-80:]}"

    def _fetch(self, shard: RemoteShard, path: Path) -> None:
        """Download a shard, unless another process has done so in the meantime."""
        self._check_size(shard)
        since, reason = self._failed.get(shard.url, (-_FAILED_SECONDS, ""))
        if time.monotonic() - since < _FAILED_SECONDS:
            raise RemoteError(reason)
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock_path(path)):
                if path.exists():
                    return
                partial = self._reserve(shard, path)
                stage = self.folder / "locks"
                with reporting_full_disk(stage, target=path, size_bytes=shard.size):
                    download(shard, partial)
                # Others count what there is meanwhile, and would miss a file that changes its name.
                with self._room():
                    os.replace(partial, path)
        except RemoteError as error:
            # Each of its pairs would wait for it again.
            self._failed[shard.url] = time.monotonic(), str(error)
            raise
        except PermissionError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}), and remote shards are kept "
                f"there while they are read. Name another folder with {FOLDER_VARIABLE}."
            ) from error

    def _check_size(self, shard: RemoteShard) -> None:
        if shard.size > self.max_bytes:
            raise InputError(
                f"shard {shard.url} takes {shard.size} bytes, more than the {self.max_bytes} of "
                f"the cache of remote shards. Raise {BYTES_VARIABLE}; a few dozen shards should "
                f"fit."
            )

    def _reserve(self, shard: RemoteShard, path: Path) -> Path:
        """Make room for a shard, and return the file to download it to.

        The name of that file says what it will take, so that others count it from now on.
        """
        partial = path.with_name(f"{path.name}.{shard.size}.partial")
        while True:
            with self._room():
                if partial.exists() or self._make_room(shard.size):
                    partial.touch()
                    return partial
            # All others are being read or fetched, which ends.
            time.sleep(_POLL_SECONDS)

    def _room(self) -> FileLock:
        """Return the lock of what the folder holds."""
        return FileLock(self.folder / "locks" / "room")

    def _make_room(self, size: int) -> bool:
        """Drop the least recently used shards until `size` bytes fit; False if they do not."""
        held = sorted(self._held())
        over = sum(each.size for each in held) + size - self.max_bytes
        for each in held:
            if over <= 0:
                break
            if self._drop(each.path):
                over -= each.size
        return over <= 0

    def _held(self) -> Iterator[_Held]:
        for path in self.folder.iterdir():
            if not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                whole, size = status.st_size, path.name.split(".")[-2:-1]
                if path.suffix == ".partial" and size and size[0].isdecimal():
                    whole = int(size[0])
                yield _Held(status.st_mtime_ns, whole, path)

    def _drop(self, path: Path) -> bool:
        """Remove a shard, or an unfinished download; False if it is in use."""
        if path.suffix == ".partial":
            whole = path.with_name(path.name.rsplit(".", 2)[0])
            try:
                with FileLock(self._lock_path(whole), timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                return False
            return True
        try:
            with path.open("rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except FileNotFoundError:
            return True
        except OSError:  # it is being read
            return False
        return True

    def _lock_path(self, path: Path) -> Path:
        return self.folder / "locks" / path.name


def _hold(file: IO[bytes]) -> bool:
    """Keep a file of the cache until it is closed; False if it was dropped before."""
    if fcntl is None:
        return True
    fcntl.flock(file, fcntl.LOCK_SH)
    return os.fstat(file.fileno()).st_nlink > 0
