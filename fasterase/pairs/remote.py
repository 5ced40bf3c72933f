"""Shards at a URL: which protocols are known, what a shard is now, and its bytes, with retries."""

from __future__ import annotations

import functools
import logging
import os
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fasterase.errors import FaseraseError, InputError, import_extra

log = logging.getLogger(__name__)

T = TypeVar("T")

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
# What a file system tells of a file that changes with its content, whatever its name for it.
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id", "Last-Modified")
_LATER_VERSIONS = ("LastModified", "last_modified", "mtime", "updated", "last_commit")


class RemoteError(FaseraseError, OSError):
    """A remote shard cannot be had now; the message names it and says how to mend it.

    Attributes:
        missing: whether it does not exist.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class RemoteShard(NamedTuple):
    """One version of a shard at a URL.

    Attributes:
        url: where it is.
        size: its bytes.
        version: its ETag or time of change, as the server tells it; empty if it tells neither.
    """

    url: str
    size: int
    version: str


def is_remote(shard: str) -> bool:
    """Tell whether a path is a URL of a known protocol."""
    return shard.partition("://")[0] in _PROTOCOLS and "://" in shard


def shard_name(shard: str) -> str:
    """Return the file name of a shard; of a URL without query, which may hold a signature."""
    return posixpath.basename(urlsplit(shard).path) if is_remote(shard) else os.path.basename(shard)


def describe_shards(urls: Sequence[str], *, name: str) -> dict[str, RemoteShard]:
    """Ask what is at each of the URLs, many at once; no shard is read.

    Args:
        urls: of one or more protocols.
        name: the argument that they were given as.

    Raises:
        MissingExtraError: a protocol needs a package that is not installed.
        InputError: shards are missing or cannot be reached; counts them and names one.
    """
    for url in urls:
        _filesystem(url)  # here, so that all threads share one, and a missing package is one error
    found: dict[str, RemoteShard] = {}
    failed: list[RemoteError] = []

    def ask(url: str) -> RemoteShard | RemoteError:
        try:
            return describe_shard(url)
        except RemoteError as error:
            return error

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for url, answer in zip(urls, pool.map(ask, urls), strict=True):
            if isinstance(answer, RemoteError):
                failed.append(answer)
            else:
                found[url] = answer
    if failed:
        missing = sum(error.missing for error in failed)
        what = "are missing" if missing == len(failed) else "cannot be opened"
        raise InputError(
            f"`{name}`: {len(failed)} of {len(urls)} shards {what}, such as: {failed[0]}"
        ) from failed[0]
    return found


def describe_shard(url: str) -> RemoteShard:
    """Ask what is at the URL.

    Raises:
        RemoteError: nothing, or it cannot be reached, or its size is unknown.
    """
    info = _try(url, lambda: _call(_filesystem(url), "info", url))
    size = info.get("size")
    if not isinstance(size, int):
        raise RemoteError(
            f"shard {url}: its server does not tell its size, by which a truncated download is "
            f"recognised. Copy the shards to local files, or to another server."
        )
    versions = (info[key] for key in (*_VERSIONS, *_LATER_VERSIONS) if info.get(key))
    return RemoteShard(url, size, str(next(versions, "")))


def download(shard: RemoteShard, path: Path) -> None:
    """Append to the file at `path` what it lacks of the shard.

    Raises:
        RemoteError: it is missing, has changed, does not answer, or ends before its size.
    """
    now = describe_shard(shard.url)
    if now != shard:
        raise RemoteError(
            f"shard {shard.url} has changed since it was opened (it had {shard.size} bytes, "
            f"version {shard.version!r}; now {now.size} bytes, version {now.version!r}). Leave "
            f"shards alone while they are read, and start again."
        )
    with path.open("ab") as file:
        for data in _chunks(shard, file.tell()):
            file.write(data)


def _chunks(shard: RemoteShard, start: int) -> Iterator[bytes]:
    """Yield the bytes of a shard from `start` on."""
    while start < shard.size:
        end = min(start + CHUNK_BYTES, shard.size)
        data = _try(shard.url, functools.partial(_read, shard, start, end))
        yield data
        start += len(data)


def _read(shard: RemoteShard, start: int, end: int) -> bytes:
    """Return bytes `start` to `end - 1`, or all from `start` on if the server knows no ranges."""
    data = _call(_filesystem(shard.url), "cat_file", shard.url, start=start, end=end)
    if len(data) == shard.size:
        return data[start:]
    if len(data) != end - start:
        raise OSError(
            f"it is truncated: {len(data)} of the {end - start} bytes from byte {start} on came"
        )
    return data


def _try(url: str, request: Callable[[], T]) -> T:
    """Make a request, up to `TRIES` times.

    Raises:
        RemoteError: it failed each time, or what it asks for is missing or forbidden.
    """
    pause = PAUSE_SECONDS
    for attempt in range(1, TRIES + 1):
        try:
            return request()
        except (FaseraseError, KeyboardInterrupt):
            raise
        # Each file system raises errors of its own: aiohttp's, botocore's, httpx's, ...
        except Exception as error:
            status = _status(error)
            if status in (404, 410) or (status is None and _says_missing(url, error)):
                raise RemoteError(
                    f"shard {url} is missing (not found on its server). Correct the pattern, or "
                    f"put the shard there.",
                    missing=True,
                ) from error
            reason = _reason(error, status)
            if status in (401, 403) or isinstance(error, PermissionError):
                raise RemoteError(
                    f"shard {url} may not be read ({reason}). Log in as its server asks for, or "
                    f"sign the URL anew."
                ) from error
            if attempt == TRIES:
                raise RemoteError(
                    f"shard {url} cannot be read: {reason}, at the last of {TRIES} tries. Check "
                    f"the network and the server; or copy the shards to local files."
                ) from error
            log.warning("Shard %s: %s; trying again.", url, reason)
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def _call(filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of a file system; one that is asynchronous gets `PATIENCE_SECONDS`.

    The others (Hugging Face's) have time limits of their own.
    """
    if not getattr(filesystem, "async_impl", False):
        return getattr(filesystem, method)(*args, **options)
    from fsspec.asyn import sync

    function = getattr(filesystem, f"_{method}")
    return sync(filesystem.loop, function, *args, timeout=PATIENCE_SECONDS, **options)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what is behind it: fsspec hides the server's answer there."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, if any."""
    for cause in _causes(error):
        for holder in (cause, getattr(cause, "response", None)):
            for field in ("status", "status_code", "code"):
                status = getattr(holder, field, None)
                if isinstance(status, int) and 400 <= status < 600:
                    return status
    return None


def _says_missing(url: str, error: Exception) -> bool:
    # Over HTTP, fsspec says so of whatever failed when it asked for a size.
    hidden = url.startswith("http") and error.__cause__ is not None
    return isinstance(error, FileNotFoundError) and not hidden


def _reason(error: Exception, status: int | None) -> str:
    if status is not None:
        return f"its server answered with status {status}"
    causes = list(_causes(error))
    if any(isinstance(e, TimeoutError) or "Timeout" in type(e).__name__ for e in causes):
        return f"it is too slow: no answer within {PATIENCE_SECONDS:g} seconds"
    return str(causes[-1]) or type(causes[-1]).__name__


def _filesystem(url: str) -> Any:
    """Return the file system of a URL.

    Raises:
        MissingExtraError: it needs a package that is not installed.
    """
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
