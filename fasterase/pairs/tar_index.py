"""The index of tar shards, an Arrow file each: built once by all who open them, and found again.

A small set is indexed in memory whenever it is opened. Of a larger one the rows of each shard are
kept in the hidden folder `.fasterase` beside the shards, or in the user's cache folder if that
cannot be written. Only a shard whose size or time of change differs from what its index says, or
whose index is damaged, is indexed again. The index of remote shards is always kept, in the user's
cache folder, and recognised by the shard's size and version; opening it again reads no shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import statistics
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from fasterase.errors import FaseraseError, InputError
from fasterase.pairs.parts import Part, make_batch
from fasterase.pairs.processes import count_processes, process_pool
from fasterase.pairs.remote import RemoteError, RemoteShard, is_remote, shard_name
from fasterase.pairs.remote_cache import ShardCache
from fasterase.pairs.tar_reader import Damage, Extent, Sample, ShardReader, count_lost
from fasterase.progress import progress_bar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bytes of shards from which on their index is kept: fewer are indexed within about a second.
KEPT_BYTES = 128 << 20
_FOLDER = ".fasterase"
# Small entries share a read; of large ones little is read in vain.
_BUFFER_BYTES = 1 << 15
_MISSING = Extent(-1, -1)
_EXTENTS = ("offset", "size", "json_offset", "json_size")


class Entries(NamedTuple):
    """The entries of a sample that are its image and its caption.

    Attributes:
        image, text: endings, the first that a sample has counts.
        json_field: the field of the json entry that is the caption if there is no text entry;
            empty for none.
    """

    image: tuple[str, ...]
    text: tuple[str, ...]
    json_field: str

    def read_captions(self, texts: Mapping[str, bytes]) -> list[str]:
        """Return the readable captions of a sample, from its text and json entries."""
        try:
            for ending in self.text:
                if ending in texts:
                    return [texts[ending].decode("utf-8-sig")]
            value = json.loads(texts["json"])[self.json_field.removeprefix("json:")]
        except (KeyError, TypeError, ValueError):
            return []
        values = value if isinstance(value, list) else [value]
        return [text for text in values if isinstance(text, str)]

    def captions(self) -> set[str]:
        """Return the endings of the entries that may hold captions."""
        return {*self.text, "json"} if self.json_field else set(self.text)

    def image_of(self, sample: Mapping[str, T]) -> T | None:
        """Return the sample's image entry, None if it has none."""
        return next((sample[ending] for ending in self.image if ending in sample), None)


def read_rows(
    shard: str,
    file: IO[bytes],
    entries: Entries,
    *,
    damage: Damage | None = None,
    wanted: Sequence[str] = (),
    take: Callable[[Sample], None] = lambda sample: None,
    **version: Any,
) -> Part:
    """Return the samples of a shard that have an image or a caption.

    What is known of the shard (`Part.facts`): its name (`shard`) and `version`; how many samples
    have images and captions, and are `torn`: have lost one of the two to damage; the bytes that are
    `readable`; the stretches of `damage`; the samples that are `cut` off and why; the `endings` of
    all entries; the `digest` of ids, sizes and captions.

    Args:
        shard: path or URL.
        file: the shard, decompressed.
        entries: which entries are images and captions.
        damage: what is known to be damaged already.
        wanted: endings of the entries whose bytes `take` needs.
        take: gets each sample.
        version: by which a changed shard is recognised.

    Raises:
        tarfile.TarError: it is no tar.
    """
    reader, name = ShardReader(file), shard_name(shard)
    known = {*entries.image, *entries.text}
    ids: list[str] = []
    captions: list[list[str]] = []
    extents: list[int] = []
    endings: set[str] = set()
    cut: dict[str, str] = {}
    torn = 0
    for sample in reader.samples({*wanted, *entries.captions()}):
        found = sample.extents.keys() | ({sample.cut} if sample.cut else set())
        endings |= found
        if found.isdisjoint(known):
            continue
        if sample.cut:
            cut[str(len(ids))] = f"the shard ends inside its {sample.cut}"
        image = entries.image_of(sample.extents)
        texts = [] if sample.cut else entries.read_captions(sample.data)
        torn += sample.torn and not (image is not None and texts)
        ids.append(f"{name}/{sample.key}")
        captions.append(texts)
        extents += (*(image or _MISSING), *sample.extents.get("json", _MISSING))
        take(sample)
    part = _as_part(ids, captions, np.array(extents, np.int64).reshape(-1, 4))
    stretches = [*([damage] if damage else []), *reader.damage]
    part.facts = {
        "shard": name,
        **version,
        "images": int((part.column("offset").to_numpy() >= 0).sum()),
        "captioned": sum(map(bool, part.every_captions())),
        "torn": torn,
        "readable": reader.readable,
        "damage": [list(stretch) for stretch in stretches],
        "cut": cut,
        "endings": sorted(endings),
        "digest": part.digest().decode(),
    }
    return part


def _as_part(ids: list[str], captions: list[list[str]], extents: np.ndarray) -> Part:
    columns = dict(zip(_EXTENTS, extents.T, strict=True))
    return Part(make_batch(ids, captions, hashed=True, **columns), {})


def add_lost(name: str, shards: Sequence[str], parts: list[Part]) -> dict[int, str]:
    """Add a part for the samples that damaged shards have lost, and warn.

    Returns:
        row -> why its sample cannot be read.
    """
    undamaged = [len(part) for part in parts if not part.facts["damage"]]
    usual = round(statistics.median(undamaged)) if undamaged else 0
    broken: dict[int, str] = {}
    ids: list[str] = []
    reasons: list[str] = []
    start = 0
    for shard, part in zip(shards, parts, strict=True):
        facts = part.facts
        broken |= {start + int(sample): reason for sample, reason in facts["cut"].items()}
        start += len(part)
        if not facts["damage"]:
            continue
        damage = [Damage(*stretch) for stretch in facts["damage"]]
        lost = count_lost(
            shard,
            len(part),
            torn=facts["torn"],
            readable=facts["readable"],
            damage=damage,
            usual=usual,
        )
        where = "; ".join(f"byte {stretch.offset}: {stretch.reason}" for stretch in damage)
        ids += [f"{facts['shard']}/lost sample {number}" for number in range(1, lost + 1)]
        reasons += [f"lost from a damaged shard ({where})"] * lost
        warnings.warn(
            f"`{name}`: shard {shard} is damaged ({where}). At least {lost + facts['torn']} of "
            f"its samples cannot be used and count as skipped, {len(part) - facts['torn']} "
            f"can. Fetch or write it again.",
            stacklevel=2,
        )
    if ids:
        parts.append(_as_part(ids, [[] for _ in ids], np.full((len(ids), 4), -1)))
    return broken | dict(enumerate(reasons, start))


def check_parts(name: str, parts: Sequence[Part], entries: Entries) -> None:
    """Raise `InputError` if there are no samples, no images or no captions."""
    facts = [part.facts for part in parts]
    found = ", ".join(sorted({ending for each in facts for ending in each["endings"]})) or "none"
    image, text = (";".join(endings) for endings in entries[:2])
    if not any(map(len, parts)):
        raise InputError(f"`{name}`: the shards hold no samples; entries found: {found}")
    if not any(each["images"] for each in facts):
        raise InputError(
            f"`{name}`: no images under {image}; entries found: {found}. Name the right ending "
            f"with `image_key`."
        )
    if not any(each["captioned"] for each in facts):
        raise InputError(
            f"`{name}`: no captions under {text}; entries found: {found}. Name the right "
            f"ending, or a field of the json entry, with `text_key`."
        )


class _Job(NamedTuple):
    """A shard to index.

    Attributes:
        path: of the shard; its URL if it is remote.
        kept: whether its index is to be written to a file.
        entries: which entries are images and captions.
        remote: what is at the URL.
        cache: where to read that from.
    """

    path: str
    kept: bool
    entries: Entries
    remote: RemoteShard | None = None
    cache: ShardCache | None = None

    def version(self) -> dict[str, Any]:
        """Return by what a changed shard is recognised."""
        if self.remote is not None:
            return {"size_bytes": self.remote.size, "version": self.remote.version}
        status = os.stat(self.path)
        return {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def open(self) -> AbstractContextManager[IO[bytes]]:
        if self.remote is not None and self.cache is not None:
            return self.cache.open(self.remote)
        return open(self.path, "rb", buffering=_BUFFER_BYTES)


def index_shards(
    shards: Sequence[str],
    *,
    name: str,
    entries: Entries,
    remote: Mapping[str, RemoteShard],
    cache: ShardCache | None,
) -> list[Part]:
    """Open the index of uncompressed shards; make what is missing of it.

    Several processes, on several machines too, may do so at once: they share the work, and none
    sees a part of a file.

    Args:
        shards: absolute paths, and URLs.
        name: the argument that the shards were given as.
        entries: which entries are images and captions.
        remote: URL -> what is there.
        cache: where remote shards are read from.

    Raises:
        InputError: a shard cannot be read.
    """
    distinct = list(dict.fromkeys(shards))
    kept = bool(remote) or sum(map(_size, distinct)) >= KEPT_BYTES
    found: dict[str, Part] = {}
    jobs: list[_Job] = []
    for path in distinct:
        job = _Job(path, kept, entries, remote.get(path), cache)
        part = _find(job) if kept else None
        if part is None:
            jobs.append(job)
        else:
            found[path] = part
    with progress_bar(f"indexing {name}", total=len(jobs), unit="shard", delay=2) as bar:
        try:
            for path, part in _run(jobs):
                found[path] = part
                bar.update()
        except InputError as error:
            raise InputError(f"`{name}`: {error}") from error
    return [found[path] for path in shards]


def _run(jobs: list[_Job]) -> Iterator[tuple[str, Part]]:
    """Yield the path of each shard and its rows, in the order in which they are done."""
    workers = count_processes(len(jobs)) if jobs and jobs[0].kept else 1
    if workers < 2:
        for job in jobs:
            part = _index(job)
            assert part is not None
            yield job.path, part
        return
    # Processes that start together meet at few shards.
    random.Random(os.getpid()).shuffle(jobs)
    with process_pool(workers) as pool:
        for wait in (False, True):
            futures = {pool.submit(_index, job, wait=wait): job for job in jobs}
            jobs = []
            for future in as_completed(futures):
                job = futures.pop(future)
                part = future.result()
                if part is None:
                    jobs.append(job)
                else:
                    yield job.path, part


def _index(job: _Job, *, wait: bool = True) -> Part | None:
    """Index a shard, and keep its rows if they are to be kept.

    None if another process is at it, unless `wait` waits for that. Rows that cannot be written,
    since a disk is full or read-only, stay in memory.
    """
    if not job.kept:
        return _read_shard(job)
    path = index_path(job.path, job.entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError:
        return _read_shard(job)
    try:
        return _open(path, job) or _keep(_read_shard(job), path)
    finally:
        # Whoever waits for this file finds the rows; whoever makes a new one, too.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _keep(part: Part, path: Path) -> Part:
    try:
        return part.save(path)
    except (FaseraseError, OSError) as error:
        log.warning("Shard index: %s", error)
        return part


def _read_shard(job: _Job) -> Part:
    try:
        with job.open() as file:
            return read_rows(job.path, file, job.entries, **job.version())
    except RemoteError as error:
        raise InputError(str(error)) from error
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"shard {job.path} cannot be read: {error}") from error


def _find(job: _Job) -> Part | None:
    """Open the index of a shard, wherever it is kept; None if it has to be made."""
    return next(filter(None, (_open(path, job) for path in _paths(job.path, job.entries))), None)


def _open(path: Path, job: _Job) -> Part | None:
    try:
        part = Part.open(str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("Shard index: %s is damaged (%s) and is made again.", path, error)
        return None
    if not job.version().items() <= part.facts.items():
        log.info("Shard index: %s has changed and is indexed again.", job.path)
        return None
    return part


def _paths(path: str, entries: Entries) -> list[Path]:
    """Return where an index may be: beside its shard if that is local, and in the user's cache.

    Other entries of one shard make other files.
    """
    chosen = hashlib.blake2b(repr(entries).encode(), digest_size=4).hexdigest()
    file = f"{shard_name(path)}.{chosen}.arrow"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parent = Path(path).parent
    whole = path if is_remote(path) else parent.resolve()
    name = hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()
    cached = cache / "fasterase" / "shards" / name / file
    return [cached] if is_remote(path) else [parent / _FOLDER / file, cached]


def index_path(path: str, entries: Entries) -> Path:
    """Return where the index of the shard at `path` is written."""
    paths = _paths(path, entries)
    can_write = len(paths) > 1 and os.access(Path(path).parent, os.W_OK)
    return paths[0 if can_write else -1]


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0
