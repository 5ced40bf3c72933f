"""Read one tar shard past damage: its samples, and the stretches that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import IO, Any, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
# An archive ends in two blocks of zeros, padded to a record of twenty; joined archives have that in
# the middle. More zeros are the hole of a download or of a disk.
_MOST_PADDING = 2 * tarfile.RECORDSIZE
_PAX = ord("x")
_FILES = b"0\0"
# Records of extended headers by which a file differs from what its own header says.
_TELLING_PAX = re.compile(rb" (path|size|GNU\.[^=\n]*|hdrcharset)=")
_DECOMPRESSORS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
_ZSTD = b"\x28\xb5\x2f\xfd"


class Damage(NamedTuple):
    """A stretch of a shard that cannot be read; its size is 0 where the shard ends too early."""

    offset: int
    size: int
    reason: str

    def touches(self, start: int, end: int) -> bool:
        """Tell whether it is beside or inside these entries, some of which it may hold."""
        return start <= self.offset + self.size and self.offset < end + _BLOCK


class _Header(tarfile.TarInfo):
    """The header of an entry. A file's in the form that nearly all have is read here.

    This takes a tenth of the time of `tarfile`, which reads every field and sums byte by byte.
    """

    @classmethod
    def fromtarfile(cls, tar: Any) -> _Header:
        start = tar.fileobj.tell()
        block = first = tar.fileobj.read(_BLOCK)
        offset = start + _BLOCK
        # webdataset's writer puts an extended header before each file, for fractions of seconds.
        if len(block) == _BLOCK and block[156] == _PAX:
            size = _plain_size(block)
            if size is not None:
                padded = -(-size // _BLOCK) * _BLOCK
                data = tar.fileobj.read(padded + _BLOCK)
                if not _TELLING_PAX.search(data, 0, size):
                    block, offset = data[padded:], offset + padded + _BLOCK
        size = _plain_size(block) if len(block) == _BLOCK else None
        name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        if size is not None and block[156] in _FILES and not block[345] and name[-1:] != "/":
            header = cls(name)
            header.size, header.offset, header.offset_data = size, start, offset
            tar.offset = offset + -(-size // _BLOCK) * _BLOCK
            return header
        tar.fileobj.seek(start)
        if len(first) < _BLOCK or not first.strip(b"\0"):
            return super().fromtarfile(tar)  # raises what `TarFile.next` takes for an end
        try:
            return super().fromtarfile(tar)
        # Damaged extended headers raise errors of many kinds, after reading on.
        except (tarfile.HeaderError, ValueError, KeyError, IndexError) as error:
            tar.fileobj.seek(start + _BLOCK)
            raise tarfile.InvalidHeaderError("damaged") from error  # type: ignore[attr-defined]


def _plain_size(block: bytes) -> int | None:
    """Return the size in a header of 512 bytes; None if it or the checksum has a rare form."""
    if block[257:262] != b"ustar":
        return None
    try:
        size = int(block[124:136].partition(b"\0")[0], 8)
        checksum = int(block[148:156].partition(b"\0")[0], 8)
    except ValueError:
        return None
    # Adler-32's low half is 1 + the sum of the bytes, modulo 65,521; summing them takes 20 times
    # as long. The checksum counts its own field as eight spaces.
    total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32
    return size if size >= 0 and (total - checksum) % 65521 == 0 else None


class ShardReader:
    """Reads the entries of an uncompressed shard, also those after a damaged stretch.

    Attributes:
        size: the bytes of the file.
        damage: the damaged stretches met so far.
        readable: the bytes of the entries met so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.damage: list[Damage] = []
        self.readable = 0
        self.size = file.seek(0, os.SEEK_END)
        self._file = file

    def entries(self) -> Iterator[tarfile.TarInfo]:
        """Yield the headers of all entries; note the stretches between that are none.

        Raises:
            tarfile.TarError: the file is empty, or holds no entry at all and is not an empty tar.
        """
        if self.size < _BLOCK:
            raise tarfile.ReadError("it is not a tar" if self.size else "it is empty")
        self._file.seek(0)
        # Without `ignore_zeros`, a damaged header and a hole of zeros would end the archive.
        tar = tarfile.TarFile(fileobj=self._file, tarinfo=_Header, ignore_zeros=True)
        end = 0
        while end < self.size and (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            self._note_gap(end, entry.offset)
            end = tar.offset
            self.readable += end - entry.offset
            yield entry
        if end > self.size:
            self.damage.append(Damage(self.size, 0, "it ends inside an entry"))
        elif self.size - end < _BLOCK:
            self.damage.append(Damage(end, 0, "it ends without the end mark of a tar"))
        else:
            self._note_gap(end, self.size - self.size % _BLOCK)
        if self.damage and not self.readable:
            raise tarfile.ReadError("it is not a tar")

    def _note_gap(self, start: int, end: int) -> None:
        if start == end:
            return
        self._file.seek(start)
        blocks = range(start, end, tarfile.RECORDSIZE)
        if any(self._file.read(min(tarfile.RECORDSIZE, end - at)).strip(b"\0") for at in blocks):
            self.damage.append(Damage(start, end - start, "headers cannot be read"))
        elif end - start > _MOST_PADDING:
            self.damage.append(Damage(start, end - start, "a hole of zeros"))

    def samples(self) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """Yield the stem of each sample, consecutive entries of one stem, and these by ending."""
        files = ((split_entry(entry.name), entry) for entry in self.entries() if entry.isfile())
        named = ((*parts, entry) for parts, entry in files if parts is not None)
        for stem, group in groupby(named, itemgetter(0)):
            yield stem, {ending: entry for _, ending, entry in group}

    def read(self, entry: tarfile.TarInfo) -> bytes:
        """Return the bytes of an entry."""
        self._file.seek(entry.offset_data)
        return self._file.read(entry.size)


def split_entry(path: str) -> tuple[str, str] | None:
    """Split `dir/key.ending` into (`dir/key`, `ending`) at the first dot of the file name.

    This is how WebDataset groups files into samples; None for files that it ignores.
    """
    folder, _, file = path.rpartition("/")
    stem, dot, ending = file.partition(".")
    if not stem or not dot or stem.startswith("__"):
        return None
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


@contextmanager
def open_sequential(stream: IO[bytes], place: str) -> Iterator[tuple[IO[bytes], list[Damage]]]:
    """Decompress a shard to a temporary file; a pipe is copied to one first.

    Args:
        stream: the shard; it gets closed.
        place: what it is called in messages.

    Yields:
        The file, and where the compressed data is damaged.

    Raises:
        OSError, and errors of their own from pipes.
    """
    with stream, tempfile.TemporaryFile() as copied, tempfile.TemporaryFile() as plain:
        raw = stream
        if not isinstance(stream, io.BufferedReader):  # a pipe of webdataset
            shutil.copyfileobj(stream, copied)
            raw = copied
        raw.seek(0)
        start = raw.read(6)
        raw.seek(0)
        if start.startswith(_ZSTD):
            raise OSError(f"zstd is not supported here; give 'pipe:zstd -dc {place}'")
        decompress = next((each for magic, each in _DECOMPRESSORS if start.startswith(magic)), None)
        if decompress is None:
            yield raw, []
            return
        damage = []
        try:
            # In single blocks, so that all of them before the damage are kept.
            with decompress(raw) as packed:
                while block := packed.read(_BLOCK):
                    plain.write(block)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            reason = f"its compressed data is damaged: {error}"
            damage.append(Damage(plain.tell(), 0, reason))
        yield plain, damage
