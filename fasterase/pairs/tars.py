"""WebDataset shards: index local tars and read them by offset, load others into memory."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import statistics
import tarfile
import warnings
from array import array
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from fasterase.errors import InputError
from fasterase.pairs.shards import Damage, Extent, Sample, ShardReader, count_lost, open_sequential
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

    Of a damaged or truncated shard, every sample that can be read is read, and a warning names it.
    The others are broken pairs: `shard.tar/lost sample 1`, ... where their keys are lost too.

    Raises:
        InputError: a shard is no tar at all, or there are no images or no captions under those
            endings.
    """
    sequential = any(not os.path.isfile(s) or s.lower().endswith(_COMPRESSED) for s in shards)
    entries = _Entries(
        (image_key or IMAGE_ENTRIES).lower().split(";"),
        (text_key or TEXT_ENTRIES).lower().split(";"),
        text_key or "",
    )
    return _load_tars(shards, name, entries) if sequential else _index_tars(shards, name, entries)


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

    def captions(self) -> set[str]:
        """Return the endings of the entries that may hold captions."""
        return {*self.text, "json"} if self.json_field else set(self.text)

    def image_of(self, sample: Mapping[str, Entry]) -> Entry | None:
        """Return the sample's image entry, None if it has none."""
        return next((sample[ending] for ending in self.image if ending in sample), None)


class _DamagedShard(NamedTuple):
    number: int
    found: int
    torn: int
    readable: int
    damage: list[Damage]


class _Collected:
    """Ids and captions of the samples read so far, except those with neither image nor text.

    Attributes:
        lost: why a row that a damaged shard has lost cannot be read, by row.
    """

    def __init__(self, name: str, shards: list[str], entries: _Entries) -> None:
        self.ids, self.captions = PackedStrings(), PackedCaptions()
        self.lost: dict[int, str] = {}
        self._name = name
        self._shards = shards
        self._entries = entries
        self._endings: set[str] = set()
        self._images = 0
        self._undamaged: list[int] = []  # samples of each undamaged shard
        self._damaged: list[_DamagedShard] = []

    def read(
        self, number: int, file: IO[bytes], *, wanted: Collection[str], damage: Damage | None = None
    ) -> Iterator[Sample]:
        """Yield the samples that count, a row each, of shard `number`.

        Args:
            file: the shard, decompressed.
            wanted: endings of the entries whose bytes are needed, beyond captions.
            damage: what is known to be damaged already.
        """
        reader = ShardReader(file)
        base = os.path.basename(self._shards[number])
        found = torn = 0
        for sample in reader.samples({*wanted, *self._entries.captions()}):
            endings = {*sample.extents, *([sample.cut] if sample.cut else [])}
            self._endings |= endings
            has_image = self._entries.image_of(sample.extents) is not None
            if not endings & {*self._entries.image, *self._entries.text}:
                continue
            if sample.cut:
                self.lost[len(self.ids)] = f"the shard ends inside its {sample.cut}"
            captions = self._entries.read_captions(sample.data)
            self.ids.append(f"{base}/{sample.key}")
            self.captions.append(captions)
            self._images += has_image
            found += 1
            torn += sample.torn and not (has_image and captions and not sample.cut)
            yield sample
        stretches = [*([damage] if damage else []), *reader.damage]
        if stretches:
            shard = _DamagedShard(number, found, torn, reader.readable, stretches)
            self._damaged.append(shard)
        else:
            self._undamaged.append(found)

    def add_lost(self) -> list[int]:
        """Add a row for each lost sample, and warn; return the number of each row's shard."""
        usual = round(statistics.median(self._undamaged)) if self._undamaged else 0
        rows: list[int] = []
        for number, found, torn, readable, damage in self._damaged:
            shard = self._shards[number]
            lost = count_lost(
                shard, found, torn=torn, readable=readable, damage=damage, usual=usual
            )
            where = "; ".join(f"byte {stretch.offset}: {stretch.reason}" for stretch in damage)
            for each in range(lost):
                self.lost[len(self.ids)] = f"lost from a damaged shard ({where})"
                self.ids.append(f"{os.path.basename(shard)}/lost sample {each + 1}")
                self.captions.append([])
            rows += [number] * lost
            warnings.warn(
                f"`{self._name}`: shard {shard} is damaged ({where}). At least "
                f"{lost + torn} of its samples cannot be used and count as skipped, "
                f"{found - torn} can. Fetch or write it again.",
                stacklevel=2,
            )
        return rows

    def check(self) -> None:
        """Raise `InputError` if there were no samples, no images or no captions."""
        found = ", ".join(sorted(self._endings)) or "none"
        name = self._name
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


class _TarPairs(EncodedSource):
    """Samples of shards, some of them perhaps lost."""

    def __init__(
        self, name: str, collected: _Collected, *, metas: PackedStrings | None = None
    ) -> None:
        super().__init__(name, ids=collected.ids, captions=collected.captions, metas=metas)
        self._lost = collected.lost

    def texts(self, index: int) -> list[str]:
        if index in self._lost:
            raise BrokenPair(self.id(index), self._lost[index])
        return super().texts(index)


class TarFiles(_TarPairs):
    """Local uncompressed tars, read by shard and offset."""

    def __init__(
        self,
        name: str,
        collected: _Collected,
        *,
        shards: list[str],
        extents: np.ndarray,  # [n, 5] int64: shard, image offset and size, json offset and size
    ) -> None:
        super().__init__(name, collected)
        self._shards = [os.path.abspath(shard) for shard in shards]
        self._extents = extents

    def _read(self, index: int, offset: int, size: int, what: str) -> bytes:
        shard = self._shards[int(self._extents[index, 0])]
        if size < 0:
            raise BrokenPair(self.id(index), f"the sample has no {what}")
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BrokenPair(self.id(index), f"{shard} cannot be read: {error}") from error
        if len(data) < size:
            raise BrokenPair(self.id(index), f"{shard} was cut off after it was opened")
        return data

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


class LoadedTars(_TarPairs):
    """Samples of tars without random access; their encoded images are held in memory."""

    def __init__(
        self,
        name: str,
        collected: _Collected,
        *,
        images: list[bytes | None],
        metas: PackedStrings,
    ) -> None:
        super().__init__(name, collected, metas=metas)
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
        # Shards in different folders may have one name, and ids are not unique then.
        return f"bytes {hashlib.blake2b(self.encoded_image(index)).hexdigest()}"


def _index_tars(shards: list[str], name: str, entries: _Entries) -> TarFiles:
    collected, extents = _Collected(name, shards, entries), array("q")
    none = Extent(-1, -1)
    for number, shard in enumerate(shards):
        try:
            with open(shard, "rb") as file:
                for sample in collected.read(number, file, wanted=()):
                    image = entries.image_of(sample.extents) or none
                    extents.extend((number, *image, *sample.extents.get("json", none)))
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"`{name}`: shard {shard} cannot be read: {error}") from error
    collected.check()
    for number in collected.add_lost():
        extents.extend((number, *none, *none))
    table = np.frombuffer(extents, dtype=np.int64).reshape(-1, 5)
    return TarFiles(name, collected, shards=shards, extents=table)


def _load_tars(shards: list[str], name: str, entries: _Entries) -> LoadedTars:
    warnings.warn(
        f"`{name}`: remote or compressed shards allow no random access; they are read once and "
        f"their images kept in memory. For large sets, use local uncompressed .tar files.",
        stacklevel=2,
    )
    images: list[bytes | None] = []
    collected, metas = _Collected(name, shards, entries), PackedStrings()
    with progress_bar(f"reading {name}", unit="pair", delay=2) as bar:
        for number, shard in enumerate(shards):
            try:
                with open_sequential(shard) as (file, damage):
                    wanted = {*entries.image, "json"}
                    for sample in collected.read(number, file, wanted=wanted, damage=damage):
                        images.append(entries.image_of(sample.data))
                        metas.append(_dump_object(sample.data.get("json", b"{}")))
                        bar.update()
            # The transports (curl, pipes, cloud clients) raise errors of their own.
            except Exception as error:
                raise InputError(f"`{name}`: shard {shard} cannot be read: {error}") from error
    collected.check()
    for _ in collected.add_lost():
        images.append(None)
        metas.append("{}")
    return LoadedTars(name, collected, images=images, metas=metas)


def _dump_object(data: bytes) -> str:
    """Normalise a json entry; anything but an object becomes an empty one."""
    try:
        value = json.loads(data)
    except ValueError:
        return "{}"
    return json.dumps(value) if isinstance(value, dict) else "{}"
