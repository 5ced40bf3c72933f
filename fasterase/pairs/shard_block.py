"""The index of one tar shard: keys, captions and offsets of its samples, in memory or in a file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import torch

from fasterase.errors import InputError
from fasterase.files import replace_file
from fasterase.pairs.prepare import hash_captions
from fasterase.pairs.remote import shard_name
from fasterase.pairs.shards import Damage, Extent, Sample, ShardReader
from fasterase.pairs.source import PackedCaptions, PackedStrings

_MAGIC = b"fasterase shard index 1\n"
_FOOTER = struct.Struct(f"<QI{len(_MAGIC)}s")  # bytes and CRC-32 of the facts before it
_TAIL_BYTES = 4096  # holds the facts of nearly all shards
MISSING = Extent(-1, -1)
_ENCODING = ("utf-8", "surrogatepass")  # file names may hold lone surrogates

Part = TypeVar("Part")


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

    def image_of(self, sample: Mapping[str, Part]) -> Part | None:
        """Return the sample's image entry, None if it has none."""
        return next((sample[ending] for ending in self.image if ending in sample), None)


@dataclass
class BlockFacts:
    """What is known of a shard beyond its samples.

    Attributes:
        shard: the shard's file name.
        size_bytes, mtime_ns: of the shard when it was indexed.
        version: of a remote shard, see `RemoteShard`.
        samples: number of samples with an image or a caption.
        images, captioned: how many of them have an image, and a caption.
        torn: how many of them have lost one or the other to damage.
        readable_bytes: of the entries.
        damage: the damaged stretches.
        cut: sample -> why it cannot be read.
        endings: of all entries.
        digest: hash of names, sizes and captions.
        columns: name -> first byte in the file and number of values.
    """

    shard: str
    size_bytes: int = -1
    mtime_ns: int = -1
    version: str = ""
    samples: int = 0
    images: int = 0
    captioned: int = 0
    torn: int = 0
    readable_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    cut: dict[int, str] = field(default_factory=dict)
    endings: list[str] = field(default_factory=list)
    digest: str = ""
    columns: dict[str, list[int]] = field(default_factory=dict)


# n samples with m captions. Sample i has key `keys[key_ends[i]:key_ends[i + 1]]` and the captions
# `caption_ends[i]` to `caption_ends[i + 1] - 1`, of which j is `texts[text_ends[j]:...]`, stripped.
COLUMNS = {
    "image_offsets": "<i8",  # [n], -1 without an image
    "image_sizes": "<i8",  # [n]
    "json_offsets": "<i8",  # [n], -1 without a json entry
    "json_sizes": "<i8",  # [n]
    "key_ends": "<i8",  # [n + 1]
    "caption_ends": "<i8",  # [n + 1]
    "text_ends": "<i8",  # [m + 1]
    "caption_hashes": "<i8",  # [m], see `hash_captions`
    "keys": "u1",
    "texts": "u1",
}


class IndexBlock:
    """The samples of one shard, in memory or in a file.

    Args:
        facts: what is known of the shard.
        columns: the samples, in memory; None if they are in a file.
        path: that file.
    """

    def __init__(
        self, facts: BlockFacts, columns: dict[str, np.ndarray] | None, path: str | None = None
    ) -> None:
        self.facts = facts
        self._in_memory = columns
        self._path = path
        self._views: dict[str, memoryview] | None = None

    def __getstate__(self) -> tuple[object, ...]:
        # Workers map the file themselves.
        return self.facts, self._in_memory, self._path

    def __setstate__(self, state: tuple[BlockFacts, dict[str, np.ndarray] | None, str]) -> None:
        self.facts, self._in_memory, self._path = state
        self._views = None

    @property
    def is_kept(self) -> bool:
        """Whether it is in a file, so that another process needs only its path."""
        return self._path is not None

    @classmethod
    def open(cls, path: str) -> IndexBlock:
        """Open the file of a block; nothing but its facts is read.

        Raises:
            OSError: there is none.
            ValueError: it is damaged; says how.
        """
        return cls(_read_facts(path), None, path)

    def save(self, path: Path) -> None:
        """Write a block in memory to a file, whole or not at all: columns, facts, footer."""
        assert self._in_memory is not None
        columns = [(name, self._in_memory[name].tobytes()) for name in COLUMNS]
        at = 0
        for name, data in columns:
            self.facts.columns[name] = [at, len(self._in_memory[name])]
            at += len(data)
        facts = json.dumps(asdict(self.facts)).encode()
        footer = _FOOTER.pack(len(facts), zlib.crc32(facts), _MAGIC)
        size = at + len(facts) + len(footer)
        with replace_file(path, size_bytes=size) as temporary, temporary.open("wb") as file:
            file.writelines([*(data for _, data in columns), facts, footer])

    @property
    def _columns(self) -> dict[str, memoryview]:
        """The columns for random access, memory-mapped if they are in a file.

        Views rather than arrays: reading one number of an array takes three times as long.
        """
        if self._views is None:
            arrays = self._in_memory if self._in_memory is not None else self._map()
            self._views = {name: array.data for name, array in arrays.items()}
        return self._views

    def _map(self) -> dict[str, np.ndarray]:
        assert self._path is not None
        self._check_unchanged()
        # Not np.memmap, which holds a file open for each block: a set has more than a process may.
        data = torch.from_file(
            self._path, shared=False, size=os.path.getsize(self._path), dtype=torch.uint8
        ).numpy()
        columns = {}
        for name, (start, count) in self.facts.columns.items():
            dtype = np.dtype(COLUMNS[name])
            columns[name] = data[start : start + count * dtype.itemsize].view(dtype)
        return columns

    def read(self, name: str) -> np.ndarray:
        """Return a copy of a column, read from the file: passes over a set leave no memory."""
        if self._in_memory is not None:
            return self._in_memory[name]
        assert self._path is not None
        self._check_unchanged()
        start, count = self.facts.columns[name]
        return np.fromfile(self._path, dtype=COLUMNS[name], count=count, offset=start)

    def _check_unchanged(self) -> None:
        """Raise `InputError` if another process has indexed another shard of this name since."""
        assert self._path is not None
        try:
            unchanged = _read_facts(self._path) == self.facts
        except (OSError, ValueError):
            unchanged = False
        if not unchanged:
            raise InputError(
                f"the index of shard {self.facts.shard} was removed or replaced while in use "
                f"({self._path}). Leave shards alone while they are read, and start again."
            )

    def key(self, sample: int) -> str:
        columns = self._columns
        ends = columns["key_ends"]
        return str(columns["keys"][ends[sample] : ends[sample + 1]], *_ENCODING)

    def captions(self, sample: int) -> list[str]:
        columns = self._columns
        bounds, ends, texts = columns["caption_ends"], columns["text_ends"], columns["texts"]
        captions = range(bounds[sample], bounds[sample + 1])
        return [str(texts[ends[i] : ends[i + 1]], *_ENCODING) for i in captions]

    def extent(self, kind: str, sample: int) -> Extent:
        """Return where the `image` or `json` entry of a sample is; -1 and -1 if it has none."""
        columns = self._columns
        return Extent(columns[f"{kind}_offsets"][sample], columns[f"{kind}_sizes"][sample])

    def every_key(self) -> Iterator[str]:
        """Yield the keys in order, in one pass."""
        yield from _strings(self.read("keys"), self.read("key_ends"))

    def every_caption(self) -> Iterator[list[str]]:
        """Yield the captions of each sample in order, in one pass."""
        captions = _strings(self.read("texts"), self.read("text_ends"))
        counts = np.diff(self.read("caption_ends"))
        if (counts == 1).all():
            yield from ([caption] for caption in captions)
            return
        for count in counts.tolist():
            yield [next(captions) for _ in range(count)]


def _read_facts(path: str) -> BlockFacts:
    """Read the facts of a block's file; raises as `IndexBlock.open` does."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        tail = file.read()
        if len(tail) < _FOOTER.size or not tail.endswith(_MAGIC):
            raise ValueError("it is cut off, or has another format")
        length, checksum, _ = _FOOTER.unpack(tail[-_FOOTER.size :])
        if length + _FOOTER.size > len(tail):
            file.seek(max(size - _FOOTER.size - length, 0))
            tail = file.read()
    data = tail[-_FOOTER.size - length : -_FOOTER.size]
    if zlib.crc32(data) != checksum:
        raise ValueError("its checksum is wrong")
    facts = BlockFacts(**json.loads(data))
    facts.damage = [Damage(*stretch) for stretch in facts.damage]
    facts.cut = {int(sample): reason for sample, reason in facts.cut.items()}
    return facts


def _strings(data: np.ndarray, ends: np.ndarray) -> Iterator[str]:
    whole, start = data.tobytes(), 0
    for end in ends[1:].tolist():
        yield str(whole[start:end], *_ENCODING)
        start = end


class BlockBuilder:
    """Collects the samples of one shard.

    Args:
        shard: path or URL.
        entries: which entries are images and captions.
    """

    def __init__(self, shard: str, entries: Entries) -> None:
        self._facts = BlockFacts(shard_name(shard))
        self._entries = entries
        self._keys, self._captions = PackedStrings(), PackedCaptions()
        self._extents: list[int] = []
        self._endings: set[str] = set()

    def read(
        self, file: IO[bytes], *, wanted: Collection[str] = (), damage: Damage | None = None
    ) -> Iterator[Sample]:
        """Yield the samples that have an image or a caption, and note them.

        Args:
            file: the shard, decompressed.
            wanted: endings of the entries whose bytes are needed, beyond captions.
            damage: what is known to be damaged already.

        Raises:
            tarfile.TarError: it is no tar.
        """
        reader = ShardReader(file)
        entries, facts = self._entries, self._facts
        known = {*entries.image, *entries.text}
        for sample in reader.samples({*wanted, *entries.captions()}):
            endings = sample.extents.keys() | ({sample.cut} if sample.cut else set())
            self._endings |= endings
            if endings.isdisjoint(known):
                continue
            if sample.cut:
                facts.cut[facts.samples] = f"the shard ends inside its {sample.cut}"
            image = entries.image_of(sample.extents)
            captions = entries.read_captions(sample.data)
            self._keys.append(sample.key)
            self._captions.append(captions)
            self._extents += (*(image or MISSING), *sample.extents.get("json", MISSING))
            facts.samples += 1
            facts.images += image is not None
            facts.torn += sample.torn and not (image is not None and captions and not sample.cut)
            yield sample
        facts.damage = [*([damage] if damage else []), *reader.damage]
        facts.readable_bytes = reader.readable

    def finish(self, *, size_bytes: int = -1, mtime_ns: int = -1, version: str = "") -> IndexBlock:
        """Return the block of what was read, in memory.

        Args:
            size_bytes, mtime_ns: of the shard's file.
            version: of a remote shard, see `RemoteShard`.
        """
        keys, key_ends = self._keys.arrays()
        texts, text_ends, caption_ends = self._captions.arrays()
        extents = np.array(self._extents, np.int64).reshape(-1, 4)
        hashes = hash_captions(list(_strings(texts, text_ends)))
        columns = dict(
            zip(
                COLUMNS,
                (*extents.T, key_ends, caption_ends, text_ends, hashes, keys, texts),
                strict=True,
            )
        )
        facts = self._facts
        facts.size_bytes, facts.mtime_ns, facts.version = size_bytes, mtime_ns, version
        facts.endings = sorted(self._endings)
        facts.captioned = int((np.diff(caption_ends) > 0).sum())
        digest = hashlib.blake2b(facts.shard.encode("utf-8", "surrogatepass"), digest_size=16)
        for name in ("image_sizes", "key_ends", "caption_ends", "text_ends", "keys", "texts"):
            digest.update(np.ascontiguousarray(columns[name]).data)
        facts.digest = digest.hexdigest()
        return IndexBlock(facts, columns)
