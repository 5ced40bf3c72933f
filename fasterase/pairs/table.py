"""`PairTable`: image-text pairs as rows, whatever they were read from; views of them, and several
tables as one. The rows are Arrow record batches, in memory or in memory-mapped files (`Part`)."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate, chain, compress, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from torch import Tensor

from fasterase.errors import InputError
from fasterase.files import replace_file
from fasterase.pairs.images import Images, decode_image
from fasterase.pairs.items import Record, parse_meta
from fasterase.pairs.prepare import caption_key, hash_captions
from fasterase.pairs.sampler import spread_indices
from fasterase.pairs.skips import BrokenPair
from fasterase.progress import Progress

T = TypeVar("T")

# Of a row: its id, its captions, other data as a JSON object (or nothing); in a tar also where its
# image and its json entry are (-1 without one). Ids are bytes, since names of files may be no text.
COLUMNS = {
    "id": pa.binary(),
    "captions": pa.list_(pa.string()),
    "metadata": pa.binary(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "json_offset": pa.int64(),
    "json_size": pa.int64(),
}
_PART_ROWS = 1 << 16
# Images whose ends enter the manifest: if one in a thousand has another one of the same size in its
# place, they miss all of these once in 60.
_MANIFEST_IMAGES = 4096
_ENCODING = ("utf-8", "surrogatepass")


class Part:
    """Some rows, in memory or in an Arrow file.

    A file is mapped when a row is first asked for, so that many of them take no memory before, and
    processes share what they read of it.

    Args:
        batch: the rows; None if they are in the file at `path`.
        facts: what is known of them together, as JSON takes it; of rows in a file also `rows`.
    """

    def __init__(
        self, batch: pa.RecordBatch | None, facts: dict[str, Any], path: str | None = None
    ) -> None:
        self.facts = facts
        self.path = path
        if batch is not None:
            self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers map the file themselves.
        return Part, (self.batch if self.path is None else None, self.facts, self.path)

    @classmethod
    def open(cls, path: str) -> Part:
        """Open a file, which is read once; OSError: there is none; ValueError: damage."""
        batch, facts = _map_file(path)
        if facts.get("checksum") != _checksum(batch, facts):
            raise ValueError("its checksum is another one")
        return cls(None, facts, path)

    def save(self, path: Path) -> Part:
        """Write rows in memory as `replace_file` does, and return them as they are there."""
        facts = self.facts | {"rows": len(self)}
        facts["checksum"] = _checksum(self.batch, facts)
        schema = self.batch.schema.with_metadata({"facts": json.dumps(facts)})
        with (
            replace_file(path, size_bytes=self.batch.nbytes) as temporary,
            ipc.new_file(str(temporary), schema) as writer,
        ):
            writer.write_batch(self.batch)
        return Part.open(str(path))

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """The rows; `InputError` if another process has replaced the file by another index."""
        assert self.path is not None
        try:
            batch, facts = _map_file(self.path)
            if facts == self.facts:
                return batch
            reason = "other facts"
        except (OSError, ValueError) as error:
            reason = str(error)
        raise InputError(
            f"the index of shard {self.facts['shard']} was removed or replaced while in use "
            f"({self.path}: {reason}). Leave shards alone while they are read, and start again; if "
            f"it fails again, remove that file."
        )

    def __len__(self) -> int:
        return self.batch.num_rows if self.path is None else self.facts["rows"]

    @cached_property
    def columns(self) -> dict[str, pa.Array]:
        """The columns by name; asking the batch takes longer than asking a column for a row."""
        return dict(zip(self.batch.schema.names, self.batch.columns, strict=True))

    def column(self, name: str) -> pa.Array:
        """Return a column for a single pass; a file is not kept mapped afterwards."""
        part = self if self.path is None else Part(None, self.facts, self.path)
        return part.batch.column(name)

    def every_id(self) -> Iterator[str]:
        """Yield the ids in order."""
        return (id.decode(*_ENCODING) for id in self.column("id").to_pylist())

    def every_captions(self) -> Iterator[list[str]]:
        """Yield the captions of each row in order."""
        captions = self.column("captions")  # its own `to_pylist` takes thrice the time
        texts = captions.flatten().to_pylist()
        return (texts[start:end] for start, end in pairwise(captions.offsets.to_pylist()))

    def digest(self) -> str:
        """Return a hash of ids, captions and, of tars, sizes."""
        if "digest" in self.facts:
            return self.facts["digest"]
        digest = hashlib.blake2b(digest_size=16)
        for name in ("id", "captions", "size"):
            if name in self.columns:
                for buffer in filter(None, self.columns[name].buffers()):
                    digest.update(buffer)
        return digest.hexdigest()


def _map_file(path: str) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Return the rows of a file and their facts."""
    # Closed at once: a set has more parts than a process may hold files open.
    with pa.memory_map(path) as file:
        reader = ipc.open_file(file)
        facts = json.loads((reader.schema.metadata or {}).get(b"facts", b""))
        return reader.get_batch(0), facts


def _checksum(batch: pa.RecordBatch, facts: dict[str, Any]) -> int:
    """Return the CRC-32 of all columns, and of all facts but a checksum."""
    value = zlib.crc32(json.dumps({**facts, "checksum": None}, sort_keys=True).encode())
    for buffer in chain.from_iterable(column.buffers() for column in batch.columns):
        value = value if buffer is None else zlib.crc32(buffer, value)
    return value


class Parts:
    """Parts of a table, one after another; `starts`: the first row of each, and their end."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.every = list(parts)
        # Bisection of a list takes a tenth of the time of one of an array.
        self.starts = [0, *accumulate(map(len, self.every))]

    def find(self, row: int) -> tuple[int, int]:
        """Return the number of the part that holds a row, and the row in that part."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def value(self, name: str, row: int) -> Any:
        """Return a value of a column; ids are bytes."""
        number, at = self.find(row)
        return self.every[number].columns[name][at].as_py()

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers, [n] int64."""
        return np.concatenate([part.column(name).to_numpy() for part in self.every])


def make_batch(
    ids: Sequence[str],
    captions: Sequence[Sequence[str]],
    **columns: Sequence[Any] | np.ndarray,
) -> pa.RecordBatch:
    """Return n rows of `COLUMNS`; captions are stripped, and blank ones left out."""
    texts = [[text for each in row if (text := each.strip())] for row in captions]
    try:
        arrays = {"captions": pa.array(texts, COLUMNS["captions"])}
    except UnicodeEncodeError:  # halves of a character, as JSON may hold
        texts = [[text.encode("utf-8", "replace").decode() for text in row] for row in texts]
        arrays = {"captions": pa.array(texts, COLUMNS["captions"])}
    arrays["id"] = pa.array([id.encode(*_ENCODING) for id in ids], COLUMNS["id"])
    arrays |= {name: pa.array(column, COLUMNS[name]) for name, column in columns.items()}
    return pa.RecordBatch.from_pydict(arrays)


def pack(rows: Iterable[tuple[str, Sequence[str], dict[str, Any] | None]]) -> list[Part]:
    """Return rows of id, captions and other data, in memory."""
    parts, rows = [], iter(rows)
    while some := list(islice(rows, _PART_ROWS)):
        ids, captions, others = zip(*some, strict=True)
        metadata = [json.dumps(each).encode() if each else b"" for each in others]
        parts.append(Part(make_batch(ids, captions, metadata=metadata), {}))
    return parts


class PairTable(Sequence[Record]):
    """Pairs in rows: id, captions, where the image is, other data. A sequence of `Record`s.

    The rows are Arrow record batches (`Part`). `select`, `where` and slices give views: rows of
    the same table in another order, of which nothing is copied. Negative rows count from the end.

    Attributes:
        name: the argument it was given as (`"forget"`, `"retain"`, ...), for messages.
        origin: what it was read from, in a few words, such as the name of a file.
        stable: whether row i is the same on every read. False for a dataset with random
            augmentation.
        classes: class names if the source has them (class-per-folder), else None.
        in_memory: whether the images are held decoded in memory, so that reading all is cheap.
        images: reads the encoded images; None if they are held or made decoded.
        indices: [n] int64, the rows of `base` that a view shows; None if it is no view.
        found: how `fasterase.find` came to these pairs, for the record of an erasure; else None.
        flags: those of the command line that made them, if they are no set of their own.
        broken: row of `base` -> why it cannot be read, where more is known than what is missing.
    """

    name: str
    origin: str | None = None
    stable: bool = True
    classes: list[str] | None = None
    in_memory: bool = False
    indices: np.ndarray | None = None
    images: Images | None = None
    found: Mapping[str, Any] | None = None
    flags: Mapping[str, Any] | None = None
    _base: PairTable | None = None
    _count: int  # rows of `base`

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        images: Images,
        *,
        classes: list[str] | None = None,
        broken: dict[int, str] | None = None,
    ) -> None:
        self.name = name
        self.parts = Parts(parts)
        self._count = self.parts.starts[-1]
        self.images = images
        self.classes = classes
        self.broken = broken or {}

    def __repr__(self) -> str:
        origin = "" if self.base.origin is None else f" of {self.base.origin}"
        whole = "" if self.indices is None else f" of {len(self.base):,}"
        return f"{self.name} pairs: {len(self):,}{whole}{origin}"

    @property
    def base(self) -> PairTable:
        """The table that this is a view of; itself if it is none."""
        return self if self._base is None else self._base

    def base_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return `rows` (n,) as rows of `base`."""
        return rows if self.indices is None else self.indices[rows]

    def select(self, rows: Sequence[int] | np.ndarray, *, name: str | None = None) -> PairTable:
        """Return a view of some rows, in the given order."""
        view = copy.copy(self)
        view._base = self.base
        view.indices = self.base_rows(np.asarray(rows, dtype=np.int64))
        view.name = name or self.name
        return view

    def where(self, mask: np.ndarray, *, name: str | None = None) -> PairTable:
        """Return a view of the rows for which `mask` ([n] bool) is true."""
        return self.select(np.flatnonzero(mask), name=name)

    def __len__(self) -> int:
        return self._count if self.indices is None else len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> Record | PairTable:
        """Decode a pair; raise `BrokenPair` if its image or caption cannot be read."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._record(index)

    def _record(self, index: int) -> Record:
        captions, id = self.texts(index), self.id(index)
        image = decode_image(self.encoded_image(index), id=id)
        text = captions[0] if len(captions) == 1 else captions
        return Record(image, text, id, meta=self.meta(index))

    def id(self, index: int) -> str:
        """Return the pair's id without decoding the image."""
        return self._id(self._row(index))

    def _id(self, row: int) -> str:  # of `base`
        return self.parts.value("id", row).decode(*_ENCODING)

    def texts(self, index: int) -> list[str] | Tensor:
        """Return all captions, or token ids [L], if possible without decoding the image.

        Raises:
            BrokenPair: there are none.
        """
        row = self._row(index)
        captions = self.parts.value("captions", row)
        if not captions:
            raise BrokenPair(self._id(row), self.broken.get(row, "no readable caption"))
        return captions

    def meta(self, index: int) -> dict[str, Any]:
        """Return other data of the pair; see `Record.meta`."""
        data = self.parts.value("metadata", self._row(index))
        return parse_meta(data or None, id=self.id(index))

    def every_id(self) -> Iterator[str]:
        """Yield the ids of all pairs in order."""
        return self._every(Part.every_id, self.id)

    def every_text(self) -> Iterator[list[str] | Tensor]:
        """Yield what `texts` returns for all pairs in order; an empty list for a broken pair."""
        return self._every(Part.every_captions, self._texts_or_none)

    def _texts_or_none(self, index: int) -> list[str] | Tensor:
        try:
            return self.texts(index)
        except BrokenPair:
            return []

    def _every(
        self, of_part: Callable[[Part], Iterator[T]], of_row: Callable[[int], T]
    ) -> Iterator[T]:
        """Yield the value of each row; few, or reordered ones, are looked up one by one.

        So are all where there are no parts, as of decoded images.
        """
        is_scattered = self.indices is not None and (
            8 * len(self.indices) < self._count or (np.diff(self.indices) <= 0).any()
        )
        if self.images is None or is_scattered:
            return map(of_row, range(len(self)))
        values = chain.from_iterable(map(of_part, self.parts.every))
        if self.indices is None:
            return values
        chosen = np.zeros(self._count, bool)
        chosen[self.indices] = True
        return compress(values, chosen.tolist())

    def caption_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `hash_captions` of all captions, [m] int64, and the row of each, [m] int64.

        They take 16 bytes a caption; as strings, those of millions of pairs take gigabytes.
        """
        counts: list[int] = []
        doing, every = f"comparing captions of {self.name}", self.every_text()
        bar = Progress(doing, items=every, total=len(self), unit="pair", delay=2)

        def keys() -> Iterator[str]:
            for texts in bar:
                texts = [texts] if isinstance(texts, Tensor) else texts
                counts.append(len(texts))
                yield from map(caption_key, texts)

        return hash_captions(keys()), np.repeat(np.arange(len(self)), counts)

    @cached_property
    def _digest(self) -> str:
        parts = "".join(part.digest() for part in self.parts.every).encode()
        digest = hashlib.blake2b(parts + self._sizes.tobytes(), digest_size=16)
        # Not the times of change, which a copy on a faster disk need not have.
        for row in spread_indices(self._count, _MANIFEST_IMAGES):
            with suppress(BrokenPair):
                digest.update(self.images.ends(row, self._id(row)))  # type: ignore[union-attr]
        return digest.hexdigest()

    def digest(self) -> str:
        """Return a hex digest by which caches recognise the data.

        It is of ids, sizes, captions, and both ends of images: of `_MANIFEST_IMAGES`, in tars of
        all.
        """
        if self.indices is None:
            return self._digest
        digest = hashlib.blake2b(self.base._digest.encode(), digest_size=16)
        digest.update(self.indices.tobytes())
        return digest.hexdigest()

    def shards(self) -> np.ndarray | None:
        """Return the number of each pair's shard, [n] int32, if shards are fetched whole.

        None if any pair is as quickly read as the next.
        """
        return None

    @cached_property
    def _sizes(self) -> np.ndarray:
        assert self.images is not None
        return self.images.sizes(self.every_id())

    def encoded_sizes(self) -> np.ndarray | None:
        """Return the bytes of each encoded image, [n] int64, -1 if missing; None if decoded."""
        return None if self.images is None else self.base._sizes[self._rows]

    def encoded_image(self, index: int) -> bytes:
        """Return the bytes of the image file. Only if `encoded_sizes` is not None."""
        assert self.images is not None
        row = self._row(index)
        return self.images.read(row, self._id(row))

    def encoded_location(self, index: int) -> str:
        """Return what identifies those bytes: the resolved path, and the position in a tar."""
        assert self.images is not None
        row = self._row(index)
        return self.images.location(row, self._id(row))

    def _row(self, index: int) -> int:
        """Return the row of `base`; raise IndexError outside the length."""
        row = range(len(self))[operator.index(index)]
        return row if self.indices is None else int(self.indices[row])

    @property
    def _rows(self) -> np.ndarray | slice:
        """What picks the rows of this view from a column of `base`."""
        return slice(None) if self.indices is None else self.indices


def _of_its_table(name: str) -> Any:
    """Return the method `name` of the table that a row is from."""

    def method(self: JoinedTable, index: int) -> Any:
        table, row = self._find(index)
        return getattr(table, name)(row)

    return method


class JoinedTable(PairTable):
    """The rows of `tables` in order; every pair keeps the id it has there."""

    def __init__(self, name: str, tables: Sequence[PairTable]) -> None:
        if not tables:
            raise InputError(f"`{name}` is empty: none of its sets has a pair.")
        self.name = name
        self._tables = list(tables)
        self._starts = [0, *accumulate(map(len, tables))]
        self._count = self._starts[-1]
        self.stable = all(table.stable for table in tables)
        self.in_memory = all(table.in_memory for table in tables)
        classes = dict.fromkeys(name for table in tables for name in table.classes or ())
        self.classes = list(classes) or None

    def _find(self, index: int) -> tuple[PairTable, int]:
        row = self._row(index)
        number = bisect_right(self._starts, row) - 1
        return self._tables[number], row - self._starts[number]

    id = _of_its_table("id")
    texts = _of_its_table("texts")
    meta = _of_its_table("meta")
    encoded_image = _of_its_table("encoded_image")
    encoded_location = _of_its_table("encoded_location")
    _record = _of_its_table("_record")

    @cached_property
    def _digest(self) -> str:
        digests = "".join(table.digest() for table in self._tables)
        return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()

    def shards(self) -> np.ndarray | None:
        found, before = [], 0
        for table in self._tables:
            shards = table.shards()
            if shards is None:
                return None
            found.append(shards + before)
            before += int(shards.max()) + 1
        return np.concatenate(found)[self._rows]

    def encoded_sizes(self) -> np.ndarray | None:
        found = [table.encoded_sizes() for table in self._tables]
        sizes = [each for each in found if each is not None]
        return np.concatenate(sizes)[self._rows] if len(sizes) == len(found) else None
