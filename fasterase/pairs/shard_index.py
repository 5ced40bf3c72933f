"""The index of many tar shards: built once by all who open them, and found again.

A small set is indexed in memory whenever it is opened. Of a larger one the block of each shard is
kept in the hidden folder `.fasterase` beside the shards, or in the user's cache folder if that
cannot be written. Only a shard whose size or time of change differs from what its block says, or
whose block is damaged, is indexed again. Blocks of remote shards are always kept, in the user's
cache folder, and recognised by the shard's size and version; opening them again reads no shard.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import statistics
import tarfile
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from fasterase.errors import FaseraseError, InputError
from fasterase.pairs.processes import count_processes, process_pool
from fasterase.pairs.remote import RemoteError, RemoteShard, is_remote, shard_name
from fasterase.pairs.shard_block import MISSING, BlockBuilder, Entries, IndexBlock
from fasterase.pairs.shard_cache import ShardCache
from fasterase.pairs.shards import Extent, count_lost
from fasterase.progress import progress_bar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bytes of shards from which on their index is kept: fewer are indexed within about a second.
KEPT_BYTES = 128 << 20
_FOLDER = ".fasterase"
# Small entries share a read; of large ones little is read in vain.
_BUFFER_BYTES = 1 << 15


class ShardIndex:
    """The samples of shards, one row each, in order; then those that damaged shards have lost.

    Attributes:
        shards: paths or URLs.
        blocks: the index of each shard.
        entries: which entries are images and captions.
        lost: row -> why its sample cannot be read.
    """

    def __init__(
        self, name: str, shards: Sequence[str], blocks: Sequence[IndexBlock], entries: Entries
    ) -> None:
        self.shards = list(shards)
        self.blocks = list(blocks)
        self.entries = entries
        counts = [block.facts.samples for block in self.blocks]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # [shards + 1]
        # Bisection of a list takes a tenth of the time of one of an array.
        self._starts: list[int] = self.starts.tolist()
        self.lost = {
            self._starts[number] + sample: reason
            for number, block in enumerate(self.blocks)
            for sample, reason in block.facts.cut.items()
        }
        self._lost_ids: list[str] = []
        self._check(name)
        self._add_lost(name)

    def __len__(self) -> int:
        return self._starts[-1] + len(self._lost_ids)

    def place(self, row: int) -> tuple[int, int]:
        """Return the shard of a row, and which of its samples it is; not of a lost sample."""
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def shard_numbers(self) -> np.ndarray:
        """Return the shard of each row, [n] int32; lost samples, which are not read, are of one."""
        rows = np.arange(len(self))
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        return np.minimum(numbers, len(self.blocks) - 1).astype(np.int32)

    def id(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        if row >= self._starts[-1]:
            return self._lost_ids[row - self._starts[-1]]
        number, sample = self.place(row)
        block = self.blocks[number]
        return f"{block.facts.shard}/{block.key(sample)}"

    def captions(self, row: int) -> list[str]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        if row >= self._starts[-1]:
            return []
        number, sample = self.place(row)
        return self.blocks[number].captions(sample)

    def extent(self, kind: str, row: int) -> Extent:
        """Return where in its shard the `image` or `json` entry is; -1 and -1 if there is none."""
        if row >= self._starts[-1]:
            return MISSING
        number, sample = self.place(row)
        return self.blocks[number].extent(kind, sample)

    def every_id(self) -> Iterator[str]:
        """Yield the ids of all rows, in one pass over the files."""
        for block in self.blocks:
            yield from (f"{block.facts.shard}/{key}" for key in block.every_key())
        yield from self._lost_ids

    def every_caption(self) -> Iterator[list[str]]:
        """Yield the captions of all rows, in one pass; none of those that cannot be read."""
        for number, block in enumerate(self.blocks):
            cut, start = block.facts.cut, self._starts[number]
            for row, captions in enumerate(block.every_caption(), start):
                yield [] if cut and row in self.lost else captions
        yield from ([] for _ in self._lost_ids)

    def every_match(self, pattern: re.Pattern[str]) -> Iterator[bool]:
        """Tell of each row whether one of its captions matches, in one pass by all cores."""
        for block, found in zip(
            self.blocks, self._over_blocks(partial(_matching, pattern)), strict=True
        ):
            found[list(block.facts.cut)] = False
            yield from found.tolist()
        yield from (False for _ in self._lost_ids)

    def _over_blocks(self, function: Callable[[IndexBlock], T]) -> Iterator[T]:
        workers = count_processes(len(self.blocks)) if self.blocks[0].is_kept else 1
        if workers < 2:
            yield from map(function, self.blocks)
            return
        with process_pool(workers) as pool:
            yield from pool.map(function, self.blocks)

    def image_sizes(self) -> np.ndarray:
        """Return the bytes of each row's image, [n] int64; -1 without one."""
        lost = np.full(len(self._lost_ids), -1, np.int64)
        return np.concatenate([*(block.read("image_sizes") for block in self.blocks), lost])

    def caption_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hash (see `hash_captions`) and the row of each caption, both [m] int64."""
        hashes = [block.read("caption_hashes") for block in self.blocks]
        counts = [np.diff(block.read("caption_ends")) for block in self.blocks]
        rows = np.repeat(np.arange(self._starts[-1]), np.concatenate(counts))
        return np.concatenate(hashes), rows

    def digest(self) -> str:
        """Return a hash of all names, sizes and captions, by which caches recognise the data."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*(block.facts.digest for block in self.blocks), *self._lost_ids):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()

    def _check(self, name: str) -> None:
        """Raise `InputError` if there are no samples, no images or no captions."""
        facts = [block.facts for block in self.blocks]
        found = ", ".join(sorted({ending for each in facts for ending in each.endings})) or "none"
        image, text = (";".join(endings) for endings in self.entries[:2])
        if not self._starts[-1]:
            raise InputError(f"`{name}`: the shards hold no samples; entries found: {found}")
        if not any(each.images for each in facts):
            raise InputError(
                f"`{name}`: no images under {image}; entries found: {found}. Name the right ending "
                f"with `image_key`."
            )
        if not any(each.captioned for each in facts):
            raise InputError(
                f"`{name}`: no captions under {text}; entries found: {found}. Name the right "
                f"ending, or a field of the json entry, with `text_key`."
            )

    def _add_lost(self, name: str) -> None:
        """Add a row for each sample that a damaged shard has lost, and warn."""
        undamaged = [b.facts.samples for b in self.blocks if not b.facts.damage]
        usual = round(statistics.median(undamaged)) if undamaged else 0
        for shard, block in zip(self.shards, self.blocks, strict=True):
            facts = block.facts
            if not facts.damage:
                continue
            lost = count_lost(
                shard,
                facts.samples,
                torn=facts.torn,
                readable=facts.readable_bytes,
                damage=facts.damage,
                usual=usual,
            )
            where = "; ".join(
                f"byte {stretch.offset}: {stretch.reason}" for stretch in facts.damage
            )
            for number in range(1, lost + 1):
                self.lost[len(self)] = f"lost from a damaged shard ({where})"
                self._lost_ids.append(f"{facts.shard}/lost sample {number}")
            warnings.warn(
                f"`{name}`: shard {shard} is damaged ({where}). At least {lost + facts.torn} of "
                f"its samples cannot be used and count as skipped, {facts.samples - facts.torn} "
                f"can. Fetch or write it again.",
                stacklevel=2,
            )


def _matching(pattern: re.Pattern[str], block: IndexBlock) -> np.ndarray:
    search = pattern.search
    found = (any(map(search, captions)) for captions in block.every_caption())
    return np.fromiter(found, bool, block.facts.samples)


class _Job(NamedTuple):
    """A shard to index.

    Attributes:
        path: of the shard; its URL if it is remote.
        kept: whether its block is to be written to a file.
        entries: which entries are images and captions.
        remote: what is at the URL.
        cache: where to read that from.
    """

    path: str
    kept: bool
    entries: Entries
    remote: RemoteShard | None = None
    cache: ShardCache | None = None


def index_shards(
    shards: Sequence[str],
    *,
    name: str,
    entries: Entries,
    remote: Mapping[str, RemoteShard] | None = None,
    cache: ShardCache | None = None,
) -> ShardIndex:
    """Open the index of uncompressed shards; make what is missing of it.

    Several processes, on several machines too, may do so at once: they share the work, and none
    sees a part of a block.

    Args:
        shards: absolute paths, and URLs.
        name: the argument that the shards were given as.
        entries: which entries are images and captions.
        remote: URL -> what is there.
        cache: where remote shards are read from.

    Raises:
        InputError: a shard cannot be read, or there are no images or no captions.
    """
    distinct = list(dict.fromkeys(shards))
    remote = remote or {}
    kept = bool(remote) or sum(map(_size, distinct)) >= KEPT_BYTES
    found: dict[str, IndexBlock] = {}
    jobs: list[_Job] = []
    for path in distinct:
        job = _Job(path, kept, entries, remote.get(path), cache)
        block = _find(job) if kept else None
        if block is None:
            jobs.append(job)
        else:
            found[path] = block
    with progress_bar(f"indexing {name}", total=len(jobs), unit="shard", delay=2) as bar:
        try:
            for path, block in _run(jobs):
                found[path] = block
                bar.update()
        except InputError as error:
            raise InputError(f"`{name}`: {error}") from error
    return ShardIndex(name, shards, [found[path] for path in shards], entries)


def _run(jobs: list[_Job]) -> Iterator[tuple[str, IndexBlock]]:
    """Yield the path of each shard and its block, in the order in which they are done."""
    workers = count_processes(len(jobs)) if jobs and jobs[0].kept else 1
    if workers < 2:
        for job in jobs:
            block = _index(job)
            assert block is not None
            yield job.path, block
        return
    # Processes that start together meet at few shards.
    random.Random(os.getpid()).shuffle(jobs)
    with process_pool(workers) as pool:
        for wait in (False, True):
            futures = {pool.submit(_index, job, wait=wait): job for job in jobs}
            jobs = []
            for future in as_completed(futures):
                job = futures.pop(future)
                block = future.result()
                if block is None:
                    jobs.append(job)
                else:
                    yield job.path, block


def _index(job: _Job, *, wait: bool = True) -> IndexBlock | None:
    """Index a shard, and keep its block if it is to be kept.

    None if another process is at it, unless `wait` waits for that. A block that cannot be written,
    since a disk is full or read-only, stays in memory.
    """
    if not job.kept:
        return _read_shard(job)
    path = block_path(job.path, job.entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError:
        return _read_shard(job)
    try:
        block = _open(path, job)
        return block or _keep(_read_shard(job), path)
    finally:
        # Whoever waits for this file finds the block; whoever makes a new one, too.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _keep(block: IndexBlock, path: Path) -> IndexBlock:
    try:
        block.save(path)
        return IndexBlock.open(str(path))
    except (FaseraseError, OSError) as error:
        log.warning("Shard index: %s", error)
        return block


def _read_shard(job: _Job) -> IndexBlock:
    builder = BlockBuilder(job.path, job.entries)
    try:
        with _open_shard(job) as file:
            status = os.fstat(file.fileno())
            for _ in builder.read(file):
                pass
    except RemoteError as error:
        raise InputError(str(error)) from error
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"shard {job.path} cannot be read: {error}") from error
    if job.remote is not None:
        return builder.finish(size_bytes=job.remote.size, version=job.remote.version)
    return builder.finish(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def _open_shard(job: _Job) -> AbstractContextManager[IO[bytes]]:
    if job.remote is not None and job.cache is not None:
        return job.cache.open(job.remote)
    return open(job.path, "rb", buffering=_BUFFER_BYTES)


def _find(job: _Job) -> IndexBlock | None:
    """Open the block of a shard, wherever it is kept; None if it has to be made."""
    for folder in _folders(job):
        block = _open(folder / _block_name(job), job)
        if block is not None:
            return block
    return None


def _open(path: Path, job: _Job) -> IndexBlock | None:
    try:
        block = IndexBlock.open(str(path))
        is_current = _is_current(block, job)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("Shard index: %s is damaged (%s) and is made again.", path, error)
        return None
    if not is_current:
        log.info("Shard index: %s has changed and is indexed again.", job.path)
        return None
    return block


def _is_current(block: IndexBlock, job: _Job) -> bool:
    facts = block.facts
    if job.remote is not None:
        return (facts.size_bytes, facts.version) == job.remote[1:]
    status = os.stat(job.path)
    return (facts.size_bytes, facts.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _folders(job: _Job) -> list[Path]:
    """Return where a block may be: beside its shard if that is local, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parent = Path(job.path).parent
    whole = job.path if is_remote(job.path) else parent.resolve()
    name = hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()
    cached = cache / "fasterase" / "shards" / name
    return [cached] if is_remote(job.path) else [parent / _FOLDER, cached]


def block_path(path: str, entries: Entries) -> Path:
    """Return where the block of the shard at `path` is written."""
    job = _Job(path, True, entries)
    folders = _folders(job)
    can_write = len(folders) > 1 and os.access(folders[0].parent, os.W_OK)
    return folders[0 if can_write else -1] / _block_name(job)


def _block_name(job: _Job) -> str:
    """Return the name of a block's file; other entries of one shard make other blocks."""
    chosen = hashlib.blake2b(repr(job.entries).encode(), digest_size=4).hexdigest()
    return f"{shard_name(job.path)}.{chosen}.index"


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0
