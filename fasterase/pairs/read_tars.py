"""WebDataset shards: index tars and read them by offset, load compressed ones into memory."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fasterase.errors import InputError
from fasterase.pairs.images import ImagesInMemory
from fasterase.pairs.items import Record
from fasterase.pairs.remote import BYTES_VARIABLE, RemoteError, Shard, describe_shards, shard_name
from fasterase.pairs.sampler import WINDOW_SHARDS
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable, Part, Parts
from fasterase.pairs.tar_index import Entries, add_lost, check_parts, index_shards, read_rows
from fasterase.pairs.tar_reader import open_sequential
from fasterase.progress import progress_bar

IMAGE_ENTRIES = "jpg;png;jpeg;webp"
TEXT_ENTRIES = "txt"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TAR_ENDINGS = (".tar", *_COMPRESSED)


def is_tar_pattern(source: str) -> bool:
    """Tell whether a string names tars: by its ending, `::` or a URL."""
    return bool(_URL.match(source)) or "::" in source or ".tar" in source


def expand_pattern(pattern: str, *, name: str) -> list[str]:
    """List the shards of a pattern, by webdataset's rules (`::`, braces) and shell wildcards.

    Raises:
        InputError: the braces are unbalanced, or local shards are missing; names one.
    """
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(pattern)
    # ValueError from braceexpand, KeyError for an environment variable that is not set.
    except (ValueError, KeyError) as error:
        raise InputError(f"`{name}`: bad shard pattern {pattern!r}: {error}") from error
    shards: list[str] = []
    for url in urls:
        url = url.removeprefix("file:")
        matched = sorted(glob.glob(url)) if any(c in url for c in "*?[") else []
        shards.extend(matched or [url])
    missing = [shard for shard in shards if not _URL.match(shard) and not os.path.isfile(shard)]
    if missing:
        raise InputError(
            f"`{name}`: {len(missing)} of {len(shards)} shards of {pattern!r} are missing, such as "
            f"{missing[0]!r}"
        )
    return shards


def open_tars(
    places: list[str], *, name: str, image_key: str | None = None, text_key: str | None = None
) -> PairTable:
    """Open the pairs of tar shards, in order; the ids are `shard.tar/key`.

    Images are the entries `jpg;png;jpeg;webp` (or `image_key`: endings joined by `;`). Captions are
    the entry `txt` (or `text_key`: endings, or a field of the `json` entry, which may be a list).
    The `json` entry becomes the pair's `meta`.

    Uncompressed tars are indexed in one pass over their headers (`tar_index`) and read by offset;
    those at a URL through a local cache of limited size (`remote`).
    A sample of img2dataset that its json entry calls failed, or whose image has another size than
    it says, is a broken pair. Compressed tars and pipes allow no random access: they are read once
    from start to end, and their encoded images are kept in memory.

    Of a damaged or truncated shard, every sample that can be read is read, and a warning names it.
    The others are broken pairs: `shard.tar/lost sample 1`, ... where their keys are lost too.

    Raises:
        InputError: a shard is missing, cannot be reached or is no tar at all, or there are no
            images or no captions under those endings.
        MissingExtraError: remote shards need a package that is not installed.
    """
    shards = describe_shards(places, name=name)
    entries = Entries(
        tuple((image_key or IMAGE_ENTRIES).lower().split(";")),
        tuple((text_key or TEXT_ENTRIES).lower().split(";")),
        text_key or "",
    )
    for shard in shards:
        is_compressed = shard_name(shard.place).lower().endswith(_COMPRESSED)
        if is_compressed or not (shard.cache or os.path.isfile(shard.place)):
            return _load_tars(shards, name, entries)
    parts = index_shards(shards, name=name, entries=entries)
    broken = add_lost(name, shards, parts)
    _check_cache(name, {shard for shard in shards if shard.cache is not None})
    return TarTable(name, parts, TarImages(shards, parts, entries), broken=broken)


class TarImages:
    """The entries of uncompressed tars, read by shard and offset.

    Attributes:
        shards: where they are.
        entries: which entries of a shard the index holds.

    Args:
        parts: the index of each shard, and that of lost samples.
    """

    def __init__(self, shards: Sequence[Shard], parts: Sequence[Part], entries: Entries) -> None:
        self.shards = list(shards)
        self.entries = entries
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
        number, at = self._parts.find(row)
        part = self._parts.every[number]
        size = part.value(f"{kind}size", at)
        if size < 0:
            return None
        shard = self.shards[number]
        try:
            with shard.open() as file:
                file.seek(part.value(f"{kind}offset", at))
                data = file.read(size)
        except RemoteError as error:
            raise BrokenPair(id, str(error)) from error
        except OSError as error:
            raise BrokenPair(id, f"{shard.place} cannot be read: {error}") from error
        if len(data) < size:
            raise BrokenPair(id, f"{shard.place} was cut off after it was opened")
        return data

    def location(self, row: int, id: str) -> str:
        number, at = self._parts.find(row)
        shard = self.shards[number]
        place = _resolve(shard.place) if shard.cache is None else shard.place
        return f"{place}::{self._parts.every[number].value('offset', at)}"

    def shard_numbers(self) -> np.ndarray | None:
        """Return the shard of each row, [n] int32; None if all are local."""
        if not any(shard.cache for shard in self.shards):
            return None
        numbers = np.repeat(np.arange(len(self._parts.every)), np.diff(self._parts.starts))
        # Lost samples, which are not read, are of one of them.
        return np.minimum(numbers, len(self.shards) - 1).astype(np.int32)


class TarTable(PairTable):
    """Samples of uncompressed tars, some of them perhaps lost."""

    images: TarImages

    def _meta(self, row: int) -> dict[str, Any]:
        data = self.images.read_entry(row, self._id(row), "json_")
        try:
            meta = {} if data is None else json.loads(data)
        except ValueError as error:
            raise BrokenPair(self._id(row), f"json cannot be read: {error}") from error
        return meta if isinstance(meta, dict) else {}

    def _record(self, row: int) -> Record:
        """Read a pair; it is broken if the json entry of img2dataset contradicts its image.

        `width` and `height` are of the image as it was stored, `original_width` as it was
        downloaded. Other data sets, without the latter, may mean other sizes.
        """
        record = super()._record(row)
        meta, size = record.meta, record.image.size
        if not {"status", "width", "height", "original_width"} <= meta.keys():
            return record
        if meta["status"] != "success":
            raise BrokenPair(record.id, f"its download failed: status {meta['status']!r}")
        said = (meta["width"], meta["height"])
        # Some of its resizers turn the image by its EXIF orientation, and some only say so.
        if all(isinstance(side, int) for side in said) and sorted(said) != sorted(size):
            raise BrokenPair(
                record.id,
                f"the image has {size[0]} x {size[1]} pixels, its json entry says "
                f"{said[0]} x {said[1]}",
            )
        return record

    @functools.cached_property
    def _digest(self) -> str:
        # Sizes are in those of the parts; reading the column again would take seconds of many.
        parts = "".join(part.digest() for part in self.parts.every).encode()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()

    def _shards(self) -> np.ndarray | None:
        return self.images.shard_numbers()


# Resolving a path asks the file system about each of its folders.
_resolve = functools.cache(os.path.realpath)


def _check_cache(name: str, shards: set[Shard]) -> None:
    """Warn if training would fetch the same remote shards again and again."""
    # Workers read the next window ahead while others still read this one.
    needed = min(len(shards), 2 * WINDOW_SHARDS) * max((shard.size for shard in shards), default=0)
    held = min((shard.cache.max_bytes for shard in shards if shard.cache), default=0)
    if held < needed:
        warnings.warn(
            f"`{name}`: the cache of remote shards holds {held} bytes. Training shuffles "
            f"{WINDOW_SHARDS} shards together and would fetch them more than once. Raise "
            f"{BYTES_VARIABLE} to {needed} or more for each of the sets to forget and to retain.",
            stacklevel=2,
        )


def _load_tars(shards: list[Shard], name: str, entries: Entries) -> PairTable:
    from webdataset.gopen import gopen

    warnings.warn(
        f"`{name}`: compressed shards and pipes allow no random access; they are read once and "
        f"their images kept in memory. For large sets, use uncompressed .tar files.",
        stacklevel=2,
    )
    images: list[bytes | None] = []
    parts: list[Part] = []
    for shard in progress_bar(f"reading {name}", items=shards, unit="shard", delay=2):
        try:
            stream = gopen(shard.place) if shard.cache is None else shard.open()
            with open_sequential(stream, shard.place) as (file, damage):
                parts.append(read_rows(shard, file, entries, damage=damage, images=images))
        except RemoteError as error:
            raise InputError(f"`{name}`: {error}") from error
        # Pipes raise errors of their own.
        except Exception as error:
            raise InputError(f"`{name}`: shard {shard.place} cannot be read: {error}") from error
    check_parts(name, parts, entries)
    broken = add_lost(name, shards, parts)
    images += [None] * (sum(map(len, parts)) - len(images))
    return PairTable(name, parts, ImagesInMemory(images), broken=broken)
