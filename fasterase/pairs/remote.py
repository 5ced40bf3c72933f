"""Shards: local files, and remote ones read through a local cache of limited size.

One process of a machine fetches a shard whole while the others wait; a download that was cut off
resumes. A copy is named by a hash of URL, size and version: a shard that changes on its server is
another file, and one whose URL is signed anew the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import posixpath
import re
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from filelock import FileLock, Timeout

from fasterase.errors import InputError, hide_secrets, import_extra
from fasterase.files import flush_to_disk, reporting_full_disk

log = logging.getLogger(__name__)

# Protocol -> the module that speaks it, and the extra of fasterase that installs that.
_PROTOCOLS = {
    "http": ("aiohttp", "remote"),
    "https": ("aiohttp", "remote"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
    "hf": ("huggingface_hub", "remote"),
}
# Seconds that one request may take: of CHUNK_BYTES, at least 140 kB/s.
PATIENCE_SECONDS = 60.0
TRIES = 3
PAUSE_SECONDS = 2.0  # before the second try; doubled for each further one
CHUNK_BYTES = 8 << 20
_ASKED_AT_ONCE = 16
# Large enough for one read to cover several small entries, small enough to waste little on others.
_BUFFER_BYTES = 1 << 15
# Metadata that change with a file's content, under the names that file systems use; the first one
# present is used.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id", "Last-Modified"),
    *("LastModified", "last_modified", "mtime", "updated", "last_commit"),
)
# Parameters of a URL that sign it and say until when: of AWS, Google and CloudFront, and those of
# Azure, which are too short to be recognised without its `sig`.
_SIGNING = re.compile(
    "x-(amz|goog)-.*|(aws|google)access(key)?id|signature|expires|policy|key-pair-id|.*token",
    re.IGNORECASE,
)
_OF_AZURE: tuple[str, ...] = ("sig", "sv", "ss", "srt", "sp", "se", "st", "spr", "sr", "sip")
_OF_AZURE += ("skoid", "sktid", "skt", "ske", "sks", "skv")
FOLDER_VARIABLE = "FASTERASE_SHARD_CACHE"
BYTES_VARIABLE = "FASTERASE_SHARD_CACHE_BYTES"
DEFAULT_BYTES = 64 << 30
# Seconds for which a shard that could not be fetched counts as broken, before it is tried again.
_FAILED_SECONDS = 300.0
_POLL_SECONDS = 0.05
_KEY_BYTES = 12  # of a hash that begins the name of a copy


class RemoteError(InputError):
    """A remote shard cannot be read now; the message names it and says what to do."""


class _MissingError(RemoteError):
    """It does not exist."""


class Shard(NamedTuple):
    """One version of a tar."""

    place: str  # its absolute path, URL or pipe
    size: int  # bytes; 0 of a pipe
    version: str  # its time of change or ETag; empty if a server tells neither
    data: bytes | None = None  # what it holds, decompressed, if it allows no random access
    damage: tuple[tuple[int, int, str], ...] = ()  # where its compressed data is damaged
    cache: ShardCache | None = None  # where what is at the URL is copied to; None of others

    def open(self) -> IO[bytes]:
        """Open the file, or the local copy of what is at the URL."""
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.cache is not None:
            return self.cache.open(self)
        return open(self.place, "rb", buffering=_BUFFER_BYTES)


def is_remote(place: str) -> bool:
    """Tell whether a path is a URL of a known protocol."""
    protocol, separator, _ = place.partition("://")
    return bool(separator) and protocol in _PROTOCOLS


def cache_folder() -> Path:
    """Return the user's cache folder of fasterase."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "fasterase"


def shard_name(place: str) -> str:
    """Return the file name of a shard; of a URL without query, which may hold a signature."""
    if is_remote(place):
        return posixpath.basename(urlsplit(place).path)
    return os.path.basename(hide_secrets(place))  # a pipe may have a URL in it


def identity(place: str) -> str:
    """Return what stays of a URL when it is signed anew; any other place as it is."""
    if not is_remote(place):
        return place
    url = urlsplit(place)
    query = parse_qsl(url.query, keep_blank_values=True)
    of_azure = _OF_AZURE if any(name == "sig" for name, _ in query) else ()
    kept = [
        (name, value)
        for name, value in query
        if name not in of_azure and not _SIGNING.fullmatch(name)
    ]
    host = url.netloc.rpartition("@")[2]
    return url._replace(netloc=host, query=urlencode(kept)).geturl()


def describe_shards(places: Sequence[str], *, name: str) -> list[Shard]:
    """Find out what is at each path, pipe or URL, at many at once; no shard is read.

    Raises:
        MissingExtraError: a protocol needs a package that is not installed.
        InputError: remote shards are missing or cannot be reached; counts them and names one.
    """
    urls = list(dict.fromkeys(filter(is_remote, places)))
    if not urls:
        return [describe_shard(place) for place in places]
    cache = ShardCache.of_environment()
    for url in urls:
        _filesystem(url)  # here, so that all threads share one, and a missing package is one error
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        asked = {url: pool.submit(describe_shard, url) for url in urls}
    errors = [answer.exception() for answer in asked.values()]
    failed = [error for error in errors if isinstance(error, RemoteError)]
    if failed:
        is_missing = all(isinstance(error, _MissingError) for error in failed)
        raise InputError(
            f"{len(failed)} of {len(urls)} shards "
            f"{'are missing' if is_missing else 'cannot be opened'}, such as: {failed[0]}"
        ) from failed[0]
    found = {url: answer.result()._replace(cache=cache) for url, answer in asked.items()}
    unversioned = [url for url, shard in found.items() if not shard.version]
    if unversioned:
        warnings.warn(
            f"`{name}`: the server of {len(unversioned)} shards, such as "
            f"{hide_secrets(unversioned[0])}, tells neither an ETag nor a date of change. A shard "
            f"that is replaced by one of the same size there is not noticed: remove its copy in "
            f"{cache.folder} then.",
            stacklevel=2,
        )
    return [found.get(place) or describe_shard(place) for place in places]


def describe_shard(place: str) -> Shard:
    """Find out what is at a path, pipe or URL.

    Raises:
        RemoteError: nothing is at the URL, or it cannot be reached, or its size is unknown.
    """
    if is_remote(place):
        info = _request(place, "info")
        if not isinstance(info.get("size"), int):
            raise RemoteError(
                f"shard {place}: its server does not tell its size, by which a truncated download "
                f"is recognised. Copy the shards to local files, or to another server."
            )
        versions = (info[key] for key in _VERSIONS if info.get(key))
        return Shard(place, info["size"], str(next(versions, "")))
    if not os.path.isfile(place):
        return Shard(place, 0, "")
    status = os.stat(place)
    return Shard(os.path.abspath(place), status.st_size, str(status.st_mtime_ns))


def _download(shard: Shard, path: Path) -> None:
    """Append to the file at `path` what it lacks of the shard; remove it if that has changed."""

    def check(data: bytes) -> bytes:
        if len(data) == shard.size:  # the server knows no ranges
            return data[start:]
        if len(data) != end - start:
            raise OSError(f"it is truncated: {len(data)} of {end - start} bytes came")
        return data

    if change := _describe_change(shard):
        raise RemoteError(change)
    with path.open("ab") as file:
        while (start := file.tell()) < shard.size:
            end = min(start + CHUNK_BYTES, shard.size)
            file.write(_request(shard.place, "cat_file", check, start=start, end=end))
    if change := _describe_change(shard):
        path.unlink()  # a mixture of both
        raise RemoteError(change)
    flush_to_disk(path)


def _describe_change(shard: Shard) -> str:
    """Return how a shard differs by now from what it was; empty if it does not."""
    now = describe_shard(shard.place)
    if now[:3] == shard[:3]:
        return ""
    return (
        f"shard {shard.place} has changed since it was opened (it had {shard.size} bytes, "
        f"version {shard.version!r}; now {now.size} bytes, version {now.version!r}). Leave "
        f"shards alone while they are read, and start again."
    )


def _request(
    url: str, method: str, check: Callable[[Any], Any] = lambda answer: answer, **options: Any
) -> Any:
    """Call a method of a URL's file system, up to `TRIES` times; `check` may refuse its answer.

    Raises:
        RemoteError: it failed each time, or what it asks for is missing.
    """
    filesystem = _filesystem(url)
    call = getattr(filesystem, method)
    if filesystem.async_impl:  # all but Hugging Face's, which has time limits of its own
        from fsspec.asyn import sync

        asynchronous = getattr(filesystem, f"_{method}")
        call = functools.partial(sync, filesystem.loop, asynchronous, timeout=PATIENCE_SECONDS)
    for attempt in range(TRIES):
        try:
            return check(call(url, **options))
        # Each file system raises errors of its own: aiohttp's, botocore's, httpx's, ...
        except Exception as error:
            reason = _explain(url, error)
            # Tracebacks show the cause, whose message has the whole URL.
            cause = error if hide_secrets(url) == url else None
        if reason is None:
            raise _MissingError(
                f"shard {url} is missing (not found on its server). Correct the pattern, or put "
                f"the shard there."
            ) from cause
        if attempt < TRIES - 1:
            log.warning("Shard %s", hide_secrets(f"{url}: {reason}; trying again."))
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise RemoteError(
        f"shard {url} cannot be read: {reason}, at the last of {TRIES} tries. Check the network, "
        f"the server and your access to it; or copy the shards to local files."
    ) from cause


def _explain(url: str, error: BaseException) -> str | None:
    """Return why a request failed; None if what it asks for is missing."""
    causes = [error]  # behind errors of its own, fsspec hides the server's answer
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    holders = [each for cause in causes for each in (cause, getattr(cause, "response", None))]
    told = [getattr(each, name, None) for each in holders for name in ("status", "status_code")]
    status = next((each for each in told if isinstance(each, int) and 400 <= each < 600), None)
    if status is not None:
        return None if status in (404, 410) else f"its server answered with status {status}"
    # Over HTTP, "not found" is what it says of whatever failed when it asked for a size.
    is_hidden = url.startswith("http") and len(causes) > 1
    if isinstance(error, FileNotFoundError) and not is_hidden:
        return None
    if any(isinstance(each, TimeoutError) or "Timeout" in type(each).__name__ for each in causes):
        return f"it is too slow: no answer within {PATIENCE_SECONDS:g} seconds"
    last_line = str(causes[-1]).rpartition("\n")[2].strip()  # aiohttp makes up a status before it
    return last_line or type(causes[-1]).__name__


def _filesystem(url: str) -> Any:
    # fsspec's own objects do not survive a fork.
    return _open_filesystem(url.partition("://")[0], os.getpid())


@functools.cache
def _open_filesystem(protocol: str, process: int) -> Any:
    module, extra = _PROTOCOLS[protocol]
    purpose = f"reading {protocol}:// shards"
    fsspec = import_extra("fsspec", extra, purpose)
    import_extra(module, extra, purpose)
    # Its own, not one that it shares with other users of this process.
    return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)


class ShardCache:
    """A folder of whole shards that all processes of this machine share; the least recently used
    are dropped first. `max_bytes` bounds what it holds, unfinished downloads included: while a
    shard is fetched, the name of its file tells what it will take."""

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
        folder = Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "remote").expanduser()
        bound = os.environ.get(BYTES_VARIABLE) or str(DEFAULT_BYTES)
        if not bound.isdecimal():
            raise InputError(
                f"{BYTES_VARIABLE}={bound!r} must be a whole number of bytes, such as "
                f"{DEFAULT_BYTES} for 64 GiB."
            )
        return cls(folder, int(bound))

    def open(self, shard: Shard) -> IO[bytes]:
        """Open a shard, fetched if need be. It may be dropped, and can be read on, while open.

        Raises:
            RemoteError: it cannot be fetched.
            InputError: it is larger than the cache, or the cache cannot be written.
            DiskFullError: there is no room for it.
        """
        path = self._path(shard)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == shard.size:
                file = path.open("rb", buffering=_BUFFER_BYTES)
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                return file
        return self._fetch(shard, path)

    def _path(self, shard: Shard) -> Path:
        facts = f"{identity(shard.place)}\n{shard.size}\n{shard.version}"
        key = hashlib.blake2b(facts.encode(), digest_size=_KEY_BYTES)
        return self.folder / f"{key.hexdigest()}-{shard_name(shard.place)[-80:]}"

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        """Return the lock of a copy by its name, or of "room": what the folder holds."""
        return FileLock(self.folder / "locks" / name[: 2 * _KEY_BYTES], timeout=timeout)

    def _fetch(self, shard: Shard, path: Path) -> IO[bytes]:
        """Download a shard, unless another process has done so in the meantime, and open it."""
        if shard.size > self.max_bytes:
            raise InputError(
                f"shard {shard.place} takes {shard.size} bytes, more than the {self.max_bytes} of "
                f"the cache of remote shards. Raise {BYTES_VARIABLE}; a few dozen shards should "
                f"fit."
            )
        since, reason = self._failed.get(shard.place, (-_FAILED_SECONDS, ""))
        if time.monotonic() - since < _FAILED_SECONDS:
            raise RemoteError(reason)
        partial = path.with_name(f"{path.name}.{shard.size}.partial")
        locks = self.folder / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            with self._lock(path.name):
                # Cut off by a disk or a copy of the folder, it would stay so.
                if not path.exists() or path.stat().st_size != shard.size:
                    path.unlink(missing_ok=True)
                    while not self._reserve(partial, shard.size):
                        time.sleep(_POLL_SECONDS)  # all others are being fetched, which ends
                    with reporting_full_disk(locks, target=path, size_bytes=shard.size):
                        _download(shard, partial)
                    with self._lock("room"):
                        os.replace(partial, path)
                return path.open("rb", buffering=_BUFFER_BYTES)
        except RemoteError as error:
            # Each of its pairs would wait for it again.
            self._failed[shard.place] = time.monotonic(), str(error)
            raise
        except PermissionError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}), and remote shards are kept "
                f"there while they are read. Name another folder with {FOLDER_VARIABLE}."
            ) from error

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make the file to download a shard to, if there is room or the oldest files leave it."""
        with self._lock("room"):
            if partial.exists():
                return True
            files = self.folder.glob("?" * 2 * _KEY_BYTES + "-*")
            held = [(path.stat().st_mtime_ns, path, _whole_size(path)) for path in files]
            over = size + sum(each for *_, each in held) - self.max_bytes
            for _, path, each in sorted(held):
                # One that is being fetched is kept; Windows also refuses if it is open.
                with contextlib.suppress(Timeout, OSError):
                    if over > 0:
                        with self._lock(path.name, timeout=0):
                            path.unlink()
                        over -= each
            if over <= 0:
                partial.touch()
            return over <= 0


def _whole_size(path: Path) -> int:
    """Return the bytes that a file of the cache takes, or will take."""
    return int(path.name.split(".")[-2]) if path.suffix == ".partial" else path.stat().st_size
