"""WebDataset shards: tars are indexed and read by offset, compressed ones and pipes from memory.

`tar_reader.py` finds the members of one. The index of remote shards and of large sets is kept, an
Arrow file for each shard, in the folder `.fasterase` beside the shards or in the user's cache
folder. Only a shard whose size or version (time of change, ETag) is not what its index says, or
whose index is damaged, is indexed again.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
import random
import re
import tarfile
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fasterase.errors import FaseraseError, InputError, hide_secrets
from fasterase.numerals import counted
from fasterase.pairs.images import Images
from fasterase.pairs.items import USUAL, Keys, Record, parse_meta
from fasterase.pairs.processes import count_processes, process_pool
from fasterase.pairs.remote import (
    BYTES_VARIABLE,
    RemoteError,
    Shard,
    cache_folder,
    describe_shards,
    identity,
    shard_name,
)
from fasterase.pairs.sampler import WINDOW_SHARDS
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable, Part, Parts
from fasterase.pairs.tar_reader import Entries, add_lost, read_rows, read_whole
from fasterase.progress import SHORT_SECONDS, Progress, say

log = logging.getLogger(__name__)

IMAGE_ENTRIES = "jpg;png;jpeg;webp"
TEXT_ENTRIES = "txt"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TAR_ENDINGS = (".tar", *_COMPRESSED)
# Bytes of shards from which on their index is kept: fewer are indexed within about a second.
KEPT_BYTES = 128 << 20
_FOLDER = ".fasterase"


def is_tar_pattern(source: str) -> bool:
    """Tell whether a string names tars: by its ending, `::` or a URL."""
    return bool(_URL.match(source)) or "::" in source or ".tar" in source


def expand_pattern(pattern: str) -> list[str]:
    """List the shards of a pattern, by webdataset's rules (`::`, braces) and shell wildcards.

    Raises:
        InputError: the braces are unbalanced, or local shards are missing; names one.
    """
    from webdataset.shardlists import expand_urls

    try:
        urls = [os.path.expanduser(url.removeprefix("file:")) for url in expand_urls(pattern)]
    # ValueError from braceexpand, KeyError for an environment variable that is not set.
    except (ValueError, KeyError) as error:
        raise InputError(f"bad shard pattern {pattern!r}: {error}") from error
    shards: list[str] = []
    for url in urls:
        shards += (sorted(glob.glob(url)) if any(c in url for c in "*?[") else ()) or [url]
    missing = [shard for shard in shards if not _URL.match(shard) and not os.path.isfile(shard)]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards of {pattern!r} are missing, such as "
            f"{missing[0]!r}"
        )
    return shards


def open_tars(places: list[str], name: str, keys: Keys = USUAL) -> TarTable:
    """Open the pairs of tar shards, in order; the ids are `shard.tar/key`.

    Images are the entries `jpg;png;jpeg;webp` (or `image_key`: endings joined by `;`). Captions are
    the entry `txt` (or `text_key`: endings, or a field of the `json` entry, which may be a list).
    The `json` entry becomes the pair's `meta`.

    Of a damaged or truncated shard, every sample that can be read is read, and a warning names it.
    The others are broken pairs: `shard.tar/lost sample 1`, ... where their keys are lost too.

    Raises:
        InputError: a shard is missing, cannot be reached or is no tar at all, or there are no
            images or no captions under those endings.
        MissingExtraError: remote shards need a package that is not installed.
    """
    shards = _load_sequential(describe_shards(places, name=name), name)
    entries = Entries(
        tuple((keys.image or IMAGE_ENTRIES).lower().split(";")),
        tuple((keys.text or TEXT_ENTRIES).lower().split(";")),
        keys.text or "",
    )
    parts = _index_shards(shards, name, entries)
    broken = add_lost(name, shards, parts)
    _check_cache(name, set(shards))
    return TarTable(name, parts, TarImages(shards, parts, entries), broken=broken)


class TarImages(Images):
    """The entries of tars, by the index of each shard, and that of lost samples: `parts`."""

    def __init__(self, shards: list[Shard], parts: list[Part], entries: Entries) -> None:
        self.shards, self.entries = shards, entries
        self._parts = Parts(parts)

    def sizes(self, ids: Iterable[str]) -> np.ndarray:
        return self._parts.column("size")

    def read(self, row: int, id: str) -> bytes:
        data = self.read_entry(row, id, "")
        if data is None:
            raise BrokenPair(id, "the sample has no image")
        return data

    def read_entry(self, row: int, id: str, kind: str) -> bytes | None:
        """Return the image (kind "") or the json entry ("json_") of a sample; None without one."""
        size = self._parts.value(f"{kind}size", row)
        if size < 0:
            return None
        shard = self.shards[self._parts.find(row)[0]]
        try:
            with shard.open() as file:
                file.seek(self._parts.value(f"{kind}offset", row))
                data = file.read(size)
        except (RemoteError, OSError) as error:
            named = f"{shard.place} cannot be read: " if isinstance(error, OSError) else ""
            raise BrokenPair(id, f"{named}{error}") from error
        if len(data) < size:
            raise BrokenPair(id, f"{shard.place} was cut off after it was opened")
        return data

    def location(self, row: int, id: str) -> str:
        shard = self.shards[self._parts.find(row)[0]]
        if shard.data is not None:  # a pipe may give something else each time
            return super().location(row, id)
        place = _resolve(shard.place) if shard.cache is None else identity(shard.place)
        return f"{place}::{self._parts.value('offset', row)}"


class TarTable(PairTable):
    """Samples of tars, some of them perhaps lost."""

    images: TarImages

    def meta(self, index: int) -> dict[str, Any]:
        id = self.id(index)
        return parse_meta(self.images.read_entry(self._row(index), id, "json_"), id=id)

    def _record(self, index: int) -> Record:
        """Read a pair; it is broken if the json entry of img2dataset contradicts its image.

        `width` and `height` are of the image as it was stored, `original_width` as it was
        downloaded. Other data sets, without the latter, may mean other sizes.
        """
        record = super()._record(index)
        meta, (width, height) = record.meta, record.image.size
        if not {"status", "width", "height", "original_width"} <= meta.keys():
            return record
        if meta["status"] != "success":
            raise BrokenPair(record.id, f"its download failed: status {meta['status']!r}")
        said = meta["width"], meta["height"]
        # Some of its resizers turn the image by its EXIF orientation, and some only say so.
        if all(isinstance(side, int) for side in said) and {*said} != {width, height}:
            stated = f"its json entry says {said[0]} x {said[1]}"
            raise BrokenPair(record.id, f"the image has {width} x {height} pixels, {stated}")
        return record

    @functools.cached_property
    def _digest(self) -> str:
        # Sizes are in those of the parts; reading the column again would take seconds of many.
        parts = "".join(part.digest() for part in self.parts.every).encode()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()

    def shards(self) -> np.ndarray | None:
        if not any(shard.cache for shard in self.images.shards):
            return None
        numbers = np.repeat(np.arange(len(self.parts.every)), np.diff(self.parts.starts))
        # Lost samples, which are not read, are of one of them.
        numbers = np.minimum(numbers, len(self.images.shards) - 1).astype(np.int32)
        return numbers[self._rows]


_resolve = functools.cache(os.path.realpath)  # asks the file system about each folder of a path


def _check_cache(name: str, shards: set[Shard]) -> None:
    """Warn if training would fetch the same remote shards again and again."""
    sizes = [shard.size for shard in shards if shard.cache is not None]
    held = min((shard.cache.max_bytes for shard in shards if shard.cache is not None), default=0)
    # Workers read the next window ahead while others still read this one.
    needed = min(len(sizes), 2 * WINDOW_SHARDS) * max(sizes, default=0)
    if held < needed:
        warnings.warn(
            f"`{name}`: the cache of remote shards holds {held} bytes. Training shuffles "
            f"{WINDOW_SHARDS} shards together and would fetch them more than once. Raise "
            f"{BYTES_VARIABLE} to {needed} or more for each of the sets to forget and to retain.",
            stacklevel=2,
        )


def _load_sequential(shards: list[Shard], name: str) -> list[Shard]:
    """Return the shards; compressed ones and pipes with all that they hold."""

    def is_sequential(shard: Shard) -> bool:
        is_compressed = shard_name(shard.place).lower().endswith(_COMPRESSED)
        return is_compressed or not (shard.cache or os.path.isfile(shard.place))

    sequential = list(dict.fromkeys(filter(is_sequential, shards)))
    if not sequential:
        return shards
    warnings.warn(
        f"`{name}`: compressed shards and pipes allow no random access; they are read once and "
        f"kept in memory. For large sets, use uncompressed .tar files.",
        stacklevel=3,
    )
    bar = Progress(f"reading {name}", items=sequential, unit="shard", delay=2)
    loaded = {shard: _load(shard) for shard in bar}
    return [loaded.get(shard, shard) for shard in shards]


def _load(shard: Shard) -> Shard:
    from webdataset.gopen import gopen

    try:
        stream = gopen(shard.place) if shard.cache is None else shard.open()
        data, damage = read_whole(stream, shard.place)
    except RemoteError:
        raise
    # Pipes raise errors of their own, which show the whole command.
    except Exception as error:
        cause = error if hide_secrets(shard.place) == shard.place else None
        raise InputError(f"shard {shard.place} cannot be read: {error}") from cause
    return shard._replace(data=data, damage=damage, cache=None)


def _index_shards(shards: Sequence[Shard], name: str, entries: Entries) -> list[Part]:
    """Open the index of shards; make what is missing of it.

    Several processes, on several machines too, may do so at once: they share the work, and none
    sees a part of a file.

    Raises:
        InputError: a shard cannot be read, or there are no samples, no images or no captions.
    """
    distinct = list(dict.fromkeys(shards))
    is_large = sum(shard.size for shard in distinct) >= KEPT_BYTES
    kept = is_large or any(shard.cache is not None for shard in distinct)
    kept = kept and all(shard.data is None for shard in distinct)
    opened = {shard: _open(shard, entries) if kept else None for shard in distinct}
    found = {shard: part for shard, part in opened.items() if part is not None}
    missing = [shard for shard in distinct if shard not in found]
    workers = count_processes(len(missing)) if kept else 1
    if workers > 1:
        # Other processes may start together with this one; so they meet at few shards.
        random.Random(os.getpid()).shuffle(missing)
    read = functools.partial(_make_index if kept else _read_shard, entries=entries)
    bar = Progress(f"indexing {name}", total=len(missing), unit="shard", delay=2)
    with bar, process_pool(workers) if workers > 1 else nullcontext() as pool:
        made = map(read, missing) if pool is None else pool.map(read, missing)
        for shard, part in zip(missing, made, strict=True):
            found[shard] = part
            bar.update()
    pairs = counted(sum(map(len, found.values())), "pair")
    said = f"{pairs} in {counted(len(found), 'shard')}"
    say(f"{name} indexed: {said}", since=bar.began, least=SHORT_SECONDS)
    parts = [found[shard] for shard in shards]
    _check_entries(parts, entries)
    return parts


def _check_entries(parts: Sequence[Part], entries: Entries) -> None:
    """Raise `InputError` if there are no samples, no images or no captions."""
    facts = [part.facts for part in parts]
    endings = ", ".join(sorted({ending for each in facts for ending in each["endings"]})) or "none"
    if not any(map(len, parts)):
        raise InputError(f"the shards hold no samples; entries found: {endings}")
    for fact, what, wanted, hint in (
        ("images", "images", entries.image, "`image_key`"),
        ("captioned", "captions", entries.text, "`text_key`, which also takes a field of the json"),
    ):
        if not any(each[fact] for each in facts):
            raise InputError(
                f"no {what} under {';'.join(wanted)}; entries found: {endings}. Name the right "
                f"ending with {hint}."
            )


def _make_index(shard: Shard, entries: Entries) -> Part:
    """Index a shard and write its index, unless another process does; what cannot be written, since
    a disk is full or read-only, stays in memory."""
    path, part = index_paths(shard.place, entries)[0], None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock") as lock:
            try:
                if (part := _open(shard, entries)) is None:
                    part = _read_shard(shard, entries)
                    part = part.save(path)
            finally:
                # Safe to unlink: waiters and later lockers find the index.
                with suppress(OSError):
                    os.unlink(lock.lock_file)
    except (FaseraseError, OSError) as error:
        if part is None and isinstance(error, FaseraseError):
            raise  # the shard cannot be read
        log.warning("Shard index: %s", error)
    return _read_shard(shard, entries) if part is None else part


def _read_shard(shard: Shard, entries: Entries) -> Part:
    try:
        with shard.open() as file:
            return read_rows(shard, file, entries)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"shard {shard.place} cannot be read: {error}") from error


def _open(shard: Shard, entries: Entries) -> Part | None:
    """Open the index of a shard, if there is one and it is still right."""
    for path in index_paths(shard.place, entries):
        try:
            part = Part.open(str(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("Shard index: %s is damaged (%s) and is made again.", path, error)
            continue
        if (part.facts["size_bytes"], part.facts.get("version")) == shard[1:3]:
            return part
        log.info("Shard index: %s has changed and is indexed again.", hide_secrets(shard.place))
    return None


def index_paths(place: str, entries: Entries) -> list[Path]:
    """Return where the index of a shard may be, first where it would be written.

    That is beside a local shard, and in the user's cache. Other entries make other files.
    """
    chosen = hashlib.blake2b(repr(entries).encode(), digest_size=4).hexdigest()
    file = f"{shard_name(place)}.{chosen}.arrow"
    is_local = "://" not in place
    parent = Path(place).parent
    whole = parent.resolve() if is_local else identity(place)
    folder = hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()
    cached = cache_folder() / "shards" / folder / file
    if not is_local:
        return [cached]
    beside = parent / _FOLDER / file
    return [beside, cached] if os.access(parent, os.W_OK) else [cached, beside]
