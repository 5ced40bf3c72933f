"""WebDataset shards: index tars and read them by offset, load compressed ones into memory."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import IO, Any

import numpy as np
from torch import Tensor

from fasterase.errors import InputError
from fasterase.pairs.remote import RemoteError, RemoteShard, describe_shards, is_remote, shard_name
from fasterase.pairs.sampler import WINDOW_SHARDS
from fasterase.pairs.shard_block import BlockBuilder, Entries
from fasterase.pairs.shard_cache import BYTES_VARIABLE, ShardCache
from fasterase.pairs.shard_index import ShardIndex, index_shards
from fasterase.pairs.shards import open_sequential
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import EncodedSource, PackedStrings, Record
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
    shards: list[str], *, name: str, image_key: str | None = None, text_key: str | None = None
) -> EncodedSource:
    """Open the pairs of tar shards, in order; the ids are `shard.tar/key`.

    Images are the entries `jpg;png;jpeg;webp` (or `image_key`: endings joined by `;`). Captions are
    the entry `txt` (or `text_key`: endings, or a field of the `json` entry, which may be a list).
    The `json` entry becomes the pair's `meta`.

    Uncompressed tars are indexed in one pass over their headers (`shard_index`) and read by offset;
    those at a URL (`remote`) from local copies, of which a bounded number is kept (`shard_cache`).
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
    urls = list(dict.fromkeys(filter(is_remote, shards)))
    cache = ShardCache.of_environment() if urls else None
    remote = describe_shards(urls, name=name) if urls else {}
    sequential = any(
        shard_name(shard).lower().endswith(_COMPRESSED)
        or not (shard in remote or os.path.isfile(shard))
        for shard in shards
    )
    entries = Entries(
        tuple((image_key or IMAGE_ENTRIES).lower().split(";")),
        tuple((text_key or TEXT_ENTRIES).lower().split(";")),
        text_key or "",
    )
    if sequential:
        return _load_tars(shards, name, entries, remote, cache)
    paths = [shard if shard in remote else os.path.abspath(shard) for shard in shards]
    index = index_shards(paths, name=name, entries=entries, remote=remote, cache=cache)
    if cache is not None:
        _warn_if_cache_is_small(name, list(remote.values()), cache)
    return TarFiles(name, index, remote=remote, cache=cache)


class TarPairs(EncodedSource):
    """Samples of shards, some of them perhaps lost; ids and captions come from their index."""

    def __init__(self, name: str, index: ShardIndex) -> None:
        self.name = name
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def id(self, index: int) -> str:
        return self.index.id(index)

    def texts(self, index: int) -> list[str]:
        if index in self.index.lost:
            raise BrokenPair(self.id(index), self.index.lost[index])
        captions = self.index.captions(index)
        if not captions:
            raise BrokenPair(self.id(index), "no readable caption")
        return captions

    def every_id(self) -> Iterator[str]:
        return self.index.every_id()

    def every_text(self) -> Iterator[list[str] | Tensor]:
        return self.index.every_caption()

    def manifest(self) -> str:
        return self.index.digest()


class TarFiles(TarPairs):
    """Uncompressed tars, read by shard and offset.

    Args:
        name: see `PairSource`.
        index: of the shards.
        remote: URL -> what was there when it was indexed.
        cache: where remote shards are read from.
    """

    def __init__(
        self,
        name: str,
        index: ShardIndex,
        *,
        remote: Mapping[str, RemoteShard] | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        super().__init__(name, index)
        self._remote = dict(remote or {})
        self._cache = cache

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        _check_downloaded(record)
        return record

    def _read(self, index: int, kind: str) -> bytes | None:
        """Return the `image` or `json` entry of a sample; None if it has none."""
        offset, size = self.index.extent(kind, index)
        if size < 0:
            return None
        shard = self._shard(index)
        try:
            with self._open(shard) as file:
                file.seek(offset)
                data = file.read(size)
        except RemoteError as error:
            raise BrokenPair(self.id(index), str(error)) from error
        except OSError as error:
            raise BrokenPair(self.id(index), f"{shard} cannot be read: {error}") from error
        if len(data) < size:
            raise BrokenPair(self.id(index), f"{shard} was cut off after it was opened")
        return data

    def _open(self, shard: str) -> AbstractContextManager[IO[bytes]]:
        if self._cache is not None and shard in self._remote:
            return self._cache.open(self._remote[shard])
        return open(shard, "rb")

    def _shard(self, index: int) -> str:
        return self.index.shards[self.index.place(index)[0]]

    def meta(self, index: int) -> dict[str, Any]:
        data = self._read(index, "json")
        try:
            meta = {} if data is None else json.loads(data)
        except ValueError as error:
            raise BrokenPair(self.id(index), f"json cannot be read: {error}") from error
        return meta if isinstance(meta, dict) else {}

    def shards(self) -> np.ndarray | None:
        return self.index.shard_numbers() if self._remote else None

    def encoded_sizes(self) -> np.ndarray:
        return self._sizes

    @cached_property
    def _sizes(self) -> np.ndarray:
        return self.index.image_sizes()

    def encoded_image(self, index: int) -> bytes:
        data = self._read(index, "image")
        if data is None:
            raise BrokenPair(self.id(index), "the sample has no image")
        return data

    def encoded_location(self, index: int) -> str:
        offset = self.index.extent("image", index).offset
        shard = self._shard(index)
        return f"{shard if shard in self._remote else _resolve(shard)}::{offset}"


class LoadedTars(TarPairs):
    """Samples of tars without random access; their encoded images are held in memory."""

    def __init__(
        self,
        name: str,
        index: ShardIndex,
        *,
        images: list[bytes | None],
        metas: PackedStrings,
    ) -> None:
        super().__init__(name, index)
        self._images = images
        self._metas = metas

    def meta(self, index: int) -> dict[str, Any]:
        return json.loads(self._metas[index])

    def encoded_sizes(self) -> np.ndarray:
        sizes = (-1 if image is None else len(image) for image in self._images)
        return np.fromiter(sizes, dtype=np.int64)

    def encoded_image(self, index: int) -> bytes:
        image = self._images[index]
        if image is None:
            raise BrokenPair(self.id(index), "the sample has no image")
        return image

    def encoded_location(self, index: int) -> str:
        # Shards in different folders may have one name, and ids are not unique then.
        return f"bytes {hashlib.blake2b(self.encoded_image(index)).hexdigest()}"


# Resolving a path asks the file system about each of its folders.
_resolve = functools.cache(os.path.realpath)


def _warn_if_cache_is_small(name: str, shards: list[RemoteShard], cache: ShardCache) -> None:
    """Warn if training would fetch the same shards again and again."""
    # Workers read the next window ahead while others still read this one.
    needed = min(len(shards), 2 * WINDOW_SHARDS) * max(shard.size for shard in shards)
    if cache.max_bytes < needed:
        warnings.warn(
            f"`{name}`: the cache of remote shards holds {cache.max_bytes} bytes. Training "
            f"shuffles {WINDOW_SHARDS} shards together and would fetch them more than once. Raise "
            f"{BYTES_VARIABLE} to {needed} or more for each of the sets to forget and to retain.",
            stacklevel=2,
        )


def _load_tars(
    shards: list[str],
    name: str,
    entries: Entries,
    remote: Mapping[str, RemoteShard],
    cache: ShardCache | None,
) -> LoadedTars:
    warnings.warn(
        f"`{name}`: compressed shards and pipes allow no random access; they are read once and "
        f"their images kept in memory. For large sets, use uncompressed .tar files.",
        stacklevel=2,
    )
    images: list[bytes | None] = []
    blocks, metas = [], PackedStrings()
    with progress_bar(f"reading {name}", unit="pair", delay=2) as bar:
        for shard in shards:
            builder = BlockBuilder(shard, entries)
            try:
                with open_sequential(shard, remote.get(shard), cache) as (file, damage):
                    wanted = {*entries.image, "json"}
                    for sample in builder.read(file, wanted=wanted, damage=damage):
                        images.append(entries.image_of(sample.data))
                        metas.append(_dump_object(sample.data.get("json", b"{}")))
                        bar.update()
            except RemoteError as error:
                raise InputError(f"`{name}`: {error}") from error
            # Pipes raise errors of their own.
            except Exception as error:
                raise InputError(f"`{name}`: shard {shard} cannot be read: {error}") from error
            blocks.append(builder.finish())
    index = ShardIndex(name, shards, blocks, entries)
    for _ in range(len(index) - len(images)):
        images.append(None)
        metas.append("{}")
    return LoadedTars(name, index, images=images, metas=metas)


def _dump_object(data: bytes) -> str:
    """Normalise a json entry; anything but an object becomes an empty one."""
    try:
        value = json.loads(data)
    except ValueError:
        return "{}"
    return json.dumps(value) if isinstance(value, dict) else "{}"


def _check_downloaded(record: Record) -> None:
    """Compare an image of img2dataset with its json entry; raise `BrokenPair` if they differ.

    `width` and `height` are of the image as it was stored, `original_width` as it was downloaded.
    Other data sets, without the latter, may mean other sizes.
    """
    meta = record.meta
    if not {"status", "width", "height", "original_width"} <= meta.keys():
        return
    if meta["status"] != "success":
        raise BrokenPair(record.id, f"its download failed: status {meta['status']!r}")
    said = (meta["width"], meta["height"])
    # Some of its resizers turn the image by its EXIF orientation, and some only say that it is.
    if all(isinstance(side, int) for side in said) and sorted(said) != sorted(record.image.size):
        width, height = record.image.size
        raise BrokenPair(
            record.id,
            f"the image has {width} x {height} pixels, its json entry says {said[0]} x {said[1]}",
        )
