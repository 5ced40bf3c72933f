"""WebDataset shards: index local tars and read them by offset, load others into memory."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
import warnings
from array import array
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fasterase.errors import InputError
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import EncodedSource, PackedCaptions, PackedStrings
from fasterase.progress import progress_bar

IMAGE_ENTRIES = "jpg;png;jpeg;webp"
TEXT_ENTRIES = "txt"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TAR_ENDINGS = (".tar", *_COMPRESSED)

Entry = TypeVar("Entry")


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

    Local uncompressed tars are indexed in one pass over their headers and read by offset. Remote
    and compressed ones allow no random access: they are read once from start to end, and their
    encoded images are kept in memory.

    Raises:
        InputError: a shard is damaged, or has no images or no captions under those endings.
    """
    sequential = any(not os.path.isfile(s) or s.lower().endswith(_COMPRESSED) for s in shards)
    entries = _Entries(
        (image_key or IMAGE_ENTRIES).lower().split(";"),
        (text_key or TEXT_ENTRIES).lower().split(";"),
        text_key or "",
    )
    return _load_tars(shards, name, entries) if sequential else _index_tars(shards, name, entries)


def split_entry(path: str) -> tuple[str, str] | None:
    """Split `dir/key.ending` into (`dir/key`, `ending`) at the first dot of the file name.

    This is how WebDataset groups files into samples; None for files that it ignores.
    """
    folder, _, file = path.rpartition("/")
    stem, dot, ending = file.partition(".")
    if not stem or not dot or stem.startswith("__"):
        return None
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


class _Entries(NamedTuple):
    """The entries of a sample that are its image and its caption."""

    image: list[str]
    text: list[str]
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

    def image_of(self, sample: Mapping[str, Entry]) -> Entry | None:
        """Return the sample's image entry, None if it has none."""
        return next((sample[ending] for ending in self.image if ending in sample), None)


class _Collected:
    """Ids and captions of the samples read so far, except those with neither image nor text."""

    def __init__(self, entries: _Entries) -> None:
        self.ids, self.captions = PackedStrings(), PackedCaptions()
        self._entries = entries
        self._endings: set[str] = set()
        self._images = 0

    def add(self, id: str, endings: Collection[str], texts: Mapping[str, bytes]) -> bool:
        """Add a sample by the endings of its entries; return whether it counts."""
        self._endings.update(endings)
        has_image = any(ending in endings for ending in self._entries.image)
        if not has_image and not any(ending in endings for ending in self._entries.text):
            return False
        self._images += has_image
        self.ids.append(id)
        self.captions.append(self._entries.read_captions(texts))
        return True

    def check(self, name: str) -> None:
        """Raise `InputError` if there were no samples, no images or no captions."""
        found = ", ".join(sorted(self._endings)) or "none"
        if not len(self.captions):
            raise InputError(f"`{name}`: the shards hold no samples; entries found: {found}")
        if self._images == 0:
            raise InputError(
                f"`{name}`: no images under {';'.join(self._entries.image)}; entries found: "
                f"{found}. Name the right ending with `image_key`."
            )
        if not self.captions.counts().any():
            raise InputError(
                f"`{name}`: no captions under {';'.join(self._entries.text)}; entries found: "
                f"{found}. Name the right ending, or a field of the json entry, with `text_key`."
            )


class _Extent(NamedTuple):
    """The bytes of a tar entry."""

    offset: int
    size: int


class TarFiles(EncodedSource):
    """Local uncompressed tars, read by shard and offset."""

    def __init__(
        self,
        name: str,
        *,
        shards: list[str],
        ids: PackedStrings,
        captions: PackedCaptions,
        extents: np.ndarray,  # [n, 5] int64: shard, image offset and size, json offset and size
    ) -> None:
        super().__init__(name, ids=ids, captions=captions)
        self._shards = [os.path.abspath(shard) for shard in shards]
        self._extents = extents

    def _read(self, index: int, offset: int, size: int, what: str) -> bytes:
        shard = self._shards[int(self._extents[index, 0])]
        if size < 0:
            raise BrokenPair(self.id(index), f"the sample has no {what}")
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BrokenPair(self.id(index), f"{shard} cannot be read: {error}") from error

    def meta(self, index: int) -> dict[str, Any]:
        offset, size = self._extents[index, 3:].tolist()
        if size < 0:
            return {}
        try:
            meta = json.loads(self._read(index, offset, size, "json"))
        except ValueError as error:
            raise BrokenPair(self.id(index), f"json cannot be read: {error}") from error
        return meta if isinstance(meta, dict) else {}

    def encoded_sizes(self) -> np.ndarray:
        return self._extents[:, 2]

    def encoded_image(self, index: int) -> bytes:
        offset, size = self._extents[index, 1:3].tolist()
        return self._read(index, offset, size, "image")

    def encoded_location(self, index: int) -> str:
        shard = self._shards[int(self._extents[index, 0])]
        return f"{os.path.realpath(shard)}::{self._extents[index, 1]}"


class LoadedTars(EncodedSource):
    """Samples of tars without random access; their encoded images are held in memory."""

    def __init__(
        self,
        name: str,
        *,
        images: list[bytes | None],
        ids: PackedStrings,
        captions: PackedCaptions,
        metas: PackedStrings,
    ) -> None:
        super().__init__(name, ids=ids, captions=captions, metas=metas)
        self._images = images

    def encoded_sizes(self) -> np.ndarray:
        sizes = (-1 if image is None else len(image) for image in self._images)
        return np.fromiter(sizes, dtype=np.int64)

    def encoded_image(self, index: int) -> bytes:
        image = self._images[index]
        if image is None:
            raise BrokenPair(self.id(index), "the sample has no image")
        return image

    def encoded_location(self, index: int) -> str:
        return self.id(index)


def _index_tars(shards: list[str], name: str, entries: _Entries) -> TarFiles:
    collected, extents = _Collected(entries), array("q")
    none = _Extent(-1, -1)
    for number, shard in enumerate(shards):
        base = os.path.basename(shard)
        try:
            for key, sample, texts in _read_samples(shard, entries):
                if collected.add(f"{base}/{key}", sample, texts):
                    image = entries.image_of(sample) or none
                    extents.extend((number, *image, *sample.get("json", none)))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"`{name}`: shard {shard} cannot be read: {error}") from error
    collected.check(name)
    table = np.frombuffer(extents, dtype=np.int64).reshape(-1, 5)
    return TarFiles(
        name, shards=shards, ids=collected.ids, captions=collected.captions, extents=table
    )


def _read_samples(
    shard: str, entries: _Entries
) -> Iterator[tuple[str, dict[str, _Extent], dict[str, bytes]]]:
    """Yield key, extents, and bytes that may hold captions, for each run of files of one stem."""
    wanted = {*entries.text, "json"} if entries.json_field else set(entries.text)
    key: str | None = None
    sample: dict[str, _Extent] = {}
    texts: dict[str, bytes] = {}
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # tarfile keeps every header that it has read: gigabytes for a large set of shards.
            tar.members = []  # type: ignore[attr-defined]
            parts = split_entry(member.name)
            if not member.isfile() or parts is None:
                continue
            if parts[0] != key:
                if key is not None:
                    yield key, sample, texts
                key, sample, texts = parts[0], {}, {}
            sample[parts[1]] = _Extent(member.offset_data, member.size)
            if parts[1] in wanted:
                file.seek(member.offset_data)
                texts[parts[1]] = file.read(member.size)
    if key is not None:
        yield key, sample, texts


def _load_tars(shards: list[str], name: str, entries: _Entries) -> LoadedTars:
    import webdataset

    warnings.warn(
        f"`{name}`: remote or compressed shards allow no random access; they are read once and "
        f"their images kept in memory. For large sets, use local uncompressed .tar files.",
        stacklevel=2,
    )
    images: list[bytes | None] = []
    collected, metas = _Collected(entries), PackedStrings()
    # Not `WebDataset`, which would split the shards over distributed ranks.
    samples = webdataset.DataPipeline(
        webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples()
    )
    try:
        for sample in progress_bar(f"reading {name}", items=samples, unit="pair", delay=2):
            endings = {key for key in sample if not key.startswith("__")}
            id = f"{Path(sample['__url__']).name}/{sample['__key__']}"
            if collected.add(id, endings, sample):
                images.append(entries.image_of(sample))
                metas.append(_dump_object(sample.get("json", b"{}")))
    # The transports (curl, pipes, cloud clients) raise errors of their own.
    except Exception as error:
        raise InputError(f"`{name}`: the shards cannot be read: {error}") from error
    collected.check(name)
    return LoadedTars(
        name, images=images, ids=collected.ids, captions=collected.captions, metas=metas
    )


def _dump_object(data: bytes) -> str:
    """Normalise a json entry; anything but an object becomes an empty one."""
    try:
        value = json.loads(data)
    except ValueError:
        return "{}"
    return json.dumps(value) if isinstance(value, dict) else "{}"
