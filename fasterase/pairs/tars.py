"""WebDataset shards: local tars are indexed and read by offset, others spooled into memory."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
import warnings
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasterase.errors import InputError
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import EncodedSource, PackedCaptions, PackedStrings

IMAGE_ENTRIES = "jpg;png;jpeg;webp"
TEXT_ENTRIES = "txt"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TAR_ENDINGS = (".tar", *_COMPRESSED)


def is_tar_pattern(source: str) -> bool:
    """Whether a string names tars: by ending, `::` or URL."""
    return bool(_URL.match(source)) or "::" in source or ".tar" in source


def expand_pattern(pattern: str, *, name: str) -> list[str]:
    """Shards of a pattern, by webdataset's rules (`::`, braces) and shell wildcards.

    Raises:
        InputError: unbalanced braces, or local shards that are not there (named).
    """
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(pattern)
    # braceexpand's own ValueError, and KeyError for an environment variable that is not set.
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
    """Pairs of tar shards, in order; the ids are `shard.tar/key`.

    Images are the entries `jpg;png;jpeg;webp` (or `image_key`, endings joined by `;`), captions the
    entry `txt` (or `text_key`: endings, or a field of the `json` entry, which may be a list). The
    `json` entry becomes the pair's meta.

    Local uncompressed tars are indexed by one pass over their headers and read by offset. Remote
    and compressed ones cannot be: they are read to the end once, encoded images kept in memory.

    Raises:
        InputError: a damaged shard, no images or no captions under those endings.
    """
    spooled = any(not os.path.isfile(s) or s.lower().endswith(_COMPRESSED) for s in shards)
    entries = _Entries(
        (image_key or IMAGE_ENTRIES).lower().split(";"),
        (text_key or TEXT_ENTRIES).lower().split(";"),
        text_key or "",
    )
    return _spool(shards, name, entries) if spooled else _index(shards, name, entries)


class _Entries(NamedTuple):
    """Which entries of a sample are its image and its caption."""

    image: list[str]
    text: list[str]
    json_field: str

    def captions(self, texts: Mapping[str, bytes]) -> list[str]:
        """Captions of a sample, from its text and json entries; empty where none is readable."""
        try:
            for ending in self.text:
                if ending in texts:
                    return [texts[ending].decode("utf-8-sig")]
            value = json.loads(texts["json"])[self.json_field.removeprefix("json:")]
        except (KeyError, TypeError, ValueError):
            return []
        values = value if isinstance(value, list) else [value]
        return [text for text in values if isinstance(text, str)]

    def check(self, name: str, seen: set[str], images: int, captions: PackedCaptions) -> None:
        found = ", ".join(sorted(seen)) or "none"
        if not len(captions):
            raise InputError(f"`{name}`: the shards hold no samples; entries found: {found}")
        if images == 0:
            raise InputError(
                f"`{name}`: no images under {';'.join(self.image)}; entries found: {found}. "
                f"Name the right ending with `image_key`."
            )
        if not captions.counts().any():
            raise InputError(
                f"`{name}`: no captions under {';'.join(self.text)}; entries found: {found}. "
                f"Name the right ending, or a field of the json entry, with `text_key`."
            )


class _Place(NamedTuple):
    offset: int
    size: int


class TarFiles(EncodedSource):
    """Local tars, read by shard and offset."""

    def __init__(
        self,
        name: str,
        *,
        shards: list[str],
        ids: PackedStrings,
        captions: PackedCaptions,
        places: np.ndarray,  # [n, 5] int64: shard, image offset and size, json offset and size
    ) -> None:
        super().__init__(name, ids=ids, captions=captions)
        self._shards = [os.path.abspath(shard) for shard in shards]
        self._places = places

    def _read(self, index: int, offset: int, size: int, what: str) -> bytes:
        shard = self._shards[int(self._places[index, 0])]
        if size < 0:
            raise BrokenPair(self.id(index), f"the sample has no {what}")
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BrokenPair(self.id(index), f"{shard} cannot be read: {error}") from error

    def meta(self, index: int) -> dict[str, Any]:
        offset, size = self._places[index, 3:].tolist()
        if size < 0:
            return {}
        try:
            meta = json.loads(self._read(index, offset, size, "json"))
        except ValueError as error:
            raise BrokenPair(self.id(index), f"json cannot be read: {error}") from error
        return meta if isinstance(meta, dict) else {}

    def encoded_sizes(self) -> np.ndarray:
        return self._places[:, 2]

    def encoded_image(self, index: int) -> bytes:
        offset, size = self._places[index, 1:3].tolist()
        return self._read(index, offset, size, "image")

    def encoded_place(self, index: int) -> str:
        shard = self._shards[int(self._places[index, 0])]
        return f"{os.path.realpath(shard)}::{self._places[index, 1]}"


def _index(shards: list[str], name: str, entries: _Entries) -> TarFiles:
    ids, captions, places = PackedStrings(), PackedCaptions(), array("q")
    seen: set[str] = set()
    images = 0
    none = _Place(-1, -1)
    for number, shard in enumerate(shards):
        base = os.path.basename(shard)
        try:
            for key, sample, texts in _samples(shard, entries):
                seen.update(sample)
                image = next((sample[e] for e in entries.image if e in sample), none)
                if image is none and not any(ending in sample for ending in entries.text):
                    continue
                images += image is not none
                ids.append(f"{base}/{key}")
                captions.append(entries.captions(texts))
                places.extend((number, *image, *sample.get("json", none)))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"`{name}`: shard {shard} cannot be read: {error}") from error
    entries.check(name, seen, images, captions)
    table = np.frombuffer(places, dtype=np.int64).reshape(-1, 5)
    return TarFiles(name, shards=shards, ids=ids, captions=captions, places=table)


def _samples(
    shard: str, entries: _Entries
) -> Iterator[tuple[str, dict[str, _Place], dict[str, bytes]]]:
    """Key, places and the bytes that may hold captions, of each run of files with one stem."""
    wanted = {*entries.text, "json"} if entries.json_field else set(entries.text)
    key: str | None = None
    sample: dict[str, _Place] = {}
    texts: dict[str, bytes] = {}
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # tarfile keeps every header it has read: gigabytes for a large shard set.
            tar.members = []  # type: ignore[attr-defined]
            parts = split_entry(member.name)
            if not member.isfile() or parts is None:
                continue
            if parts[0] != key:
                if key is not None:
                    yield key, sample, texts
                key, sample, texts = parts[0], {}, {}
            sample[parts[1]] = _Place(member.offset_data, member.size)
            if parts[1] in wanted:
                file.seek(member.offset_data)
                texts[parts[1]] = file.read(member.size)
    if key is not None:
        yield key, sample, texts


def split_entry(path: str) -> tuple[str, str] | None:
    """`dir/key.ending` as (`dir/key`, `ending`), the ending starting at the file's first dot.

    The grouping rule of WebDataset; None for files that it leaves out.
    """
    folder, _, file = path.rpartition("/")
    stem, dot, ending = file.partition(".")
    if not stem or not dot or stem.startswith("__"):
        return None
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


class SpooledTars(EncodedSource):
    """Samples of tars that allow no random access, encoded images held in memory."""

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

    def encoded_place(self, index: int) -> str:
        return self.id(index)


def _spool(shards: list[str], name: str, entries: _Entries) -> SpooledTars:
    import webdataset
    from tqdm import tqdm

    warnings.warn(
        f"`{name}`: remote or compressed shards cannot be read at random; they are read to the end "
        f"once and their images kept in memory. For large sets, copy them here as plain .tar.",
        stacklevel=2,
    )
    images: list[bytes | None] = []
    ids, captions, metas = PackedStrings(), PackedCaptions(), PackedStrings()
    seen: set[str] = set()
    # Not `WebDataset`, which splits shards over ranks: every rank needs all of them.
    samples = webdataset.DataPipeline(
        webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples()
    )
    try:
        for sample in tqdm(samples, desc=f"reading {name}", unit=" pairs", delay=2):
            endings = {key for key in sample if not key.startswith("__")}
            seen.update(endings)
            image = next((sample[e] for e in entries.image if e in endings), None)
            if image is None and not any(ending in endings for ending in entries.text):
                continue
            images.append(image)
            ids.append(f"{Path(sample['__url__']).name}/{sample['__key__']}")
            captions.append(entries.captions(sample))
            metas.append(_json_object(sample.get("json", b"{}")))
    # The reader's transports (curl, pipes, cloud clients) raise errors of their own.
    except Exception as error:
        raise InputError(f"`{name}`: the shards cannot be read: {error}") from error
    entries.check(name, seen, sum(image is not None for image in images), captions)
    return SpooledTars(name, images=images, ids=ids, captions=captions, metas=metas)


def _json_object(data: bytes) -> str:
    try:
        value = json.loads(data)
    except ValueError:
        return "{}"
    return json.dumps(value) if isinstance(value, dict) else "{}"
