"""Rows of pairs as Arrow record batches, in memory or in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
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
_PART_ROWS = 1 << 16
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
        if batch is not None:
            self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers map the file themselves.
        return Part, (self.batch if self.path is None else None, self.facts, self.path)

    @classmethod
    def open(cls, path: str) -> Part:
        """Open a file; nothing but its facts is read.

        Raises:
            OSError: there is none.
            ValueError: it is damaged; says how.
        """
        with pa.OSFile(path) as file:
            return cls(None, _read_facts(ipc.open_file(file)), path)

    def save(self, path: Path) -> Part:
        """Write rows in memory to a file, whole or not at all, and return them as they are there.

        Raises as `replace_file` does.
        """
        facts = json.dumps(self.facts | {"rows": len(self)})
        with (
            replace_file(path, size_bytes=self.batch.nbytes) as temporary,
            ipc.new_file(
                str(temporary), self.batch.schema.with_metadata({"facts": facts})
            ) as writer,
        ):
            writer.write_batch(self.batch)
        return Part.open(str(path))

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """The rows; of a file, they stay mapped."""
        return self._map()

    def _map(self) -> pa.RecordBatch:
        """Raise `InputError` if another process has indexed another shard of this name since."""
        try:
            # Closed at once: a set has more parts than a process may hold files open.
            with pa.memory_map(self.path) as file:
                reader = ipc.open_file(file)
                if _read_facts(reader) == self.facts:
                    return reader.get_batch(0)
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

    def value(self, name: str, row: int) -> Any:
        """Return a value of a column."""
        return self.batch.column(name)[row].as_py()

    def string(self, name: str, row: int) -> str:
        """Return a value of `id` or `metadata`."""
        return self.value(name, row).decode(*_ENCODING)

    def column(self, name: str) -> pa.Array:
        """Return a column for one pass over it, which leaves nothing of a file mapped."""
        return (self.batch if self.path is None else self._map()).column(name)

    def every_id(self) -> Iterator[str]:
        """Yield the ids in order."""
        return (id.decode(*_ENCODING) for id in self.column("id").to_pylist())

    def every_captions(self) -> Iterator[list[str]]:
        """Yield the captions of each row in order."""
        captions = self.column("captions")  # its own `to_pylist` takes thrice the time
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

    def digest(self) -> str:
        """Return a hash of ids, captions and, of tars, sizes."""
        if "digest" in self.facts:
            return self.facts["digest"]
        digest = hashlib.blake2b(digest_size=16)
        for name in ("id", "captions", "size"):
            if name in self.batch.schema.names:
                for buffer in filter(None, self.batch.column(name).buffers()):
                    digest.update(buffer)
        return digest.hexdigest()


def _read_facts(reader: ipc.RecordBatchFileReader) -> dict[str, Any]:
    return json.loads((reader.schema.metadata or {}).get(b"facts", b""))


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

    def find(self, row: int) -> tuple[int, int]:
        """Return the number of the part that holds a row, and the row in that part."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers, [n] int64."""
        return np.concatenate([part.column(name).to_numpy() for part in self.every])


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
    return pa.RecordBatch.from_pydict(arrays)


def pack(rows: Iterable[tuple[str, Sequence[str], dict[str, Any] | None]]) -> list[Part]:
    """Return rows of id, captions and other data, in memory."""
    parts, rows = [], iter(rows)
    while some := list(islice(rows, _PART_ROWS)):
        ids, captions, others = zip(*some, strict=True)
        metadata = [json.dumps(each).encode() if each else b"" for each in others]
        parts.append(Part(make_batch(ids, captions, metadata=metadata), {}))
    return parts
