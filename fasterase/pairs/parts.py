"""Rows of pairs as Arrow record batches, in memory or in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from fasterase.errors import InputError
from fasterase.files import replace_file
from fasterase.pairs.prepare import hash_captions

# Of a row: its id, its captions, other data as a JSON object (or nothing); in a tar also the hash
# of each caption (`hash_captions`), and where its image and its json entry are (-1 without one).
# Ids are bytes, since names of files may be no text.
COLUMNS = {
    "id": pa.binary(),
    "captions": pa.list_(pa.string()),
    "metadata": pa.binary(),
    "hashes": pa.list_(pa.int64()),
    "offset": pa.int64(),
    "size": pa.int64(),
    "json_offset": pa.int64(),
    "json_size": pa.int64(),
}
_IN_FILES = [name for name in COLUMNS if name != "metadata"]
_PART_ROWS = 1 << 16
_MAGIC = b"ARROW1"  # at the start of an Arrow file, padded to 8 bytes, and at its end
_SCHEMA_BYTE = 8
_ENCODING = ("utf-8", "surrogatepass")


class Part:
    """Some rows, in memory or in an Arrow file.

    A file is mapped when a row is first asked for, so that opening many of them takes neither time
    nor memory, and processes share what they read of it.

    Args:
        batch: the rows; None if they are in a file.
        facts: what is known of them together, as JSON takes it; of rows in a file also `rows`.
        path: the file.
    """

    def __init__(
        self, batch: pa.RecordBatch | None, facts: dict[str, Any], path: str | None = None
    ) -> None:
        self.facts = facts
        self.path = path
        self._batch = batch
        self._views: dict[str, tuple[memoryview, ...]] = {}

    def __getstate__(self) -> tuple[Any, ...]:
        # Workers map the file themselves.
        return self._batch if self.path is None else None, self.facts, self.path

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @classmethod
    def open(cls, path: str) -> Part:
        """Open a file; nothing but its facts is read.

        Raises:
            OSError: there is none.
            ValueError: it is damaged; says how.
        """
        with pa.OSFile(path) as file:
            size = file.size()
            if size < 2 * len(_MAGIC) or file.read_at(len(_MAGIC), size - len(_MAGIC)) != _MAGIC:
                raise ValueError("it is cut off, or no Arrow file")
            # The schema stands at the start too: a third of the time that the footer would take.
            file.seek(_SCHEMA_BYTE)
            return cls(None, _read_facts(ipc.read_schema(file)), path)

    def save(self, path: Path) -> Part:
        """Write rows in memory to a file, whole or not at all, and return them as they are there.

        Raises as `replace_file` does.
        """
        rows = self.batch
        facts = json.dumps(self.facts | {"rows": len(self)}).encode()
        known = {"facts": facts, "checksum": str(zlib.crc32(facts))}
        with (
            replace_file(path, size_bytes=rows.nbytes) as temporary,
            ipc.new_file(str(temporary), rows.schema.with_metadata(known)) as writer,
        ):
            writer.write_batch(rows)
        return Part.open(str(path))

    def __len__(self) -> int:
        return self.facts["rows"] if self._batch is None else self._batch.num_rows

    def string(self, name: str, row: int) -> str:
        """Return a value of `id` or `metadata`."""
        ends, data = self._view(name)
        return str(data[ends[row] : ends[row + 1]], *_ENCODING)

    def captions(self, row: int) -> list[str]:
        """Return the captions of a row, stripped, without blank ones."""
        bounds, ends, data = self._view("captions")
        captions = range(bounds[row], bounds[row + 1])
        return [str(data[ends[i] : ends[i + 1]], "utf-8") for i in captions]

    def number(self, name: str, row: int) -> int:
        """Return a value of a column of numbers."""
        return self._view(name)[0][row]

    def every_id(self) -> Iterator[str]:
        """Yield the ids in order."""
        return (str(id, *_ENCODING) for id in self.column("id").to_pylist())

    def every_captions(self) -> Iterator[list[str]]:
        """Yield the captions of each row in order."""
        captions = self.column("captions")
        texts = captions.flatten().to_pylist()
        return (texts[start:end] for start, end in pairwise(captions.offsets.to_pylist()))

    def caption_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hash and the row of each caption, both [m] int64."""
        if self.path is not None or "hashes" in self.batch.schema.names:
            column = self.column("hashes")
            hashes = column.flatten().to_numpy()
        else:
            column = self.column("captions")
            hashes = hash_captions(column.flatten().to_pylist())
        counts = np.diff(column.offsets.to_numpy())
        return hashes, np.repeat(np.arange(len(self)), counts)

    def digest(self) -> bytes:
        """Return a hash of ids, captions and, of tars, sizes."""
        if "digest" in self.facts:
            return self.facts["digest"].encode()
        digest = hashlib.blake2b(digest_size=16)
        for name in ("id", "captions", "size"):
            if name in self.batch.schema.names:
                for view in self._view(name):
                    digest.update(view)
        return digest.hexdigest().encode()

    def column(self, name: str) -> pa.Array:
        """Return a column for one pass over it: of a file, a copy that leaves nothing mapped."""
        if self.path is None:
            return self.batch.column(name)
        options = ipc.IpcReadOptions(included_fields=[_IN_FILES.index(name)])
        with pa.OSFile(self.path) as file:
            return self._read(file, options).column(0)

    @property
    def batch(self) -> pa.RecordBatch:
        if self._batch is None:
            # Closed at once: a set has more parts than a process may hold files open.
            with pa.memory_map(self.path) as file:
                self._batch = self._read(file)
        return self._batch

    def _read(self, file: pa.NativeFile, options: Any = None) -> pa.RecordBatch:
        """Raise `InputError` if another process has indexed another shard of this name since."""
        try:
            reader = ipc.open_file(file, options=options)
            if _read_facts(reader.schema) == self.facts:
                return reader.get_batch(0)
            reason = "other facts"
        except (OSError, ValueError) as error:
            reason = str(error)
        raise InputError(
            f"the index of shard {self.facts['shard']} was removed or replaced while in use "
            f"({self.path}: {reason}). Leave shards alone while they are read, and start again; if "
            f"it fails again, remove that file."
        )

    def _view(self, name: str) -> tuple[memoryview, ...]:
        """Return the buffers of a column: bounds of lists, of texts, and values.

        Reading one value of them takes a tenth of the time of Arrow's scalars.
        """
        if name not in self._views:
            buffers = self.batch.column(name).buffers()
            places, kinds = {
                2: ((1,), "q"),  # numbers
                3: ((1, 2), "iB"),  # texts
                5: ((1, 3, 4), "iiB"),  # lists of texts
            }[len(buffers)]
            self._views[name] = tuple(
                memoryview(buffers[place] or b"").cast("B").cast(kind)  # type: ignore[call-overload]
                for place, kind in zip(places, kinds, strict=True)
            )
        return self._views[name]


class Parts:
    """Parts of a table, one after another.

    Attributes:
        every: the parts.
        starts: the first row of each, and their end.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.every = list(parts)
        # Bisection of a list takes a tenth of the time of one of an array.
        self.starts = [0, *accumulate(map(len, self.every))]

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, row: int) -> tuple[int, int]:
        """Return the number of the part that holds a row, and the row in that part."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers, [n] int64."""
        columns = [part.column(name).to_numpy() for part in self.every]
        return np.concatenate(columns) if columns else np.empty(0, np.int64)


def _read_facts(schema: pa.Schema) -> dict[str, Any]:
    metadata = schema.metadata or {}
    facts = metadata.get(b"facts", b"")
    if metadata.get(b"checksum") != str(zlib.crc32(facts)).encode():
        raise ValueError("its checksum is wrong")
    return json.loads(facts)


def make_batch(
    ids: Sequence[str],
    captions: Sequence[Sequence[str]],
    *,
    hashed: bool = False,
    **columns: Sequence[Any] | np.ndarray,
) -> pa.RecordBatch:
    """Return rows of `COLUMNS`; captions are stripped, and blank ones left out.

    Args:
        ids: [n].
        captions: [n] those of each row.
        hashed: whether to add their hashes.
        columns: [n] values of others.
    """
    texts = [[text for each in row if (text := each.strip())] for row in captions]
    try:
        arrays = {"captions": pa.array(texts, COLUMNS["captions"])}
    except UnicodeEncodeError:  # halves of a character, as JSON may hold
        texts = [[text.encode("utf-8", "replace").decode() for text in row] for row in texts]
        arrays = {"captions": pa.array(texts, COLUMNS["captions"])}
    arrays["id"] = pa.array([id.encode(*_ENCODING) for id in ids], COLUMNS["id"])
    arrays |= {name: pa.array(column, COLUMNS[name]) for name, column in columns.items()}
    if hashed:
        lists = arrays["captions"]
        hashes = pa.array(hash_captions(lists.flatten().to_pylist()))
        arrays["hashes"] = pa.ListArray.from_arrays(lists.offsets, hashes)
    names = [name for name in COLUMNS if name in arrays]
    return pa.RecordBatch.from_arrays([arrays[name] for name in names], names=names)


def pack(rows: Iterable[tuple[str, Sequence[str], dict[str, Any] | None]]) -> list[Part]:
    """Return rows of id, captions and other data, in memory."""
    parts, rows = [], iter(rows)
    while some := list(islice(rows, _PART_ROWS)):
        ids, captions, others = zip(*some, strict=True)
        metadata = [json.dumps(each).encode() if each else b"" for each in others]
        parts.append(Part(make_batch(ids, captions, metadata=metadata), {}))
    return parts


def add_metadata(parts: Iterable[Part], metadata: Sequence[bytes]) -> list[Part]:
    """Return parts in memory with other data for each of all their rows, as JSON."""
    start, added = 0, []
    for part in parts:
        values = pa.array(metadata[start : start + len(part)], COLUMNS["metadata"])
        added.append(Part(part.batch.append_column("metadata", values), part.facts))
        start += len(part)
    return added
