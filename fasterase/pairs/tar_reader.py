"""Read one tar shard past damage, and tell what could not be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from fasterase.pairs.remote import RemoteShard
from fasterase.pairs.remote_cache import ShardCache

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
# An archive ends in two blocks of zeros, padded to a record of twenty; joined archives have that in
# the middle. More zeros are the hole of a download or of a disk.
_MOST_PADDING = 2 * tarfile.RECORDSIZE // _BLOCK
_PAX = ord("x")
_FILES = b"0\0"
# Records of extended headers by which a file differs from what its own header says.
_TELLING_PAX = re.compile(rb" (path|size|GNU\.[^=\n]*|hdrcharset)=")
_MOST_PAX = 1 << 16
_DECOMPRESSORS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
_ZSTD = b"\x28\xb5\x2f\xfd"


class Damage(NamedTuple):
    """A stretch of a shard that cannot be read.

    Attributes:
        offset: its first byte.
        size: its bytes; 0 where the shard ends before its end mark.
        reason: what was found there.
    """

    offset: int
    size: int
    reason: str


class Extent(NamedTuple):
    """The bytes of a tar entry."""

    offset: int
    size: int


class Entry(NamedTuple):
    """What the headers of a tar entry tell.

    Attributes:
        start: where its first header is.
        offset: where its bytes are.
        size: their number.
    """

    name: str
    start: int
    offset: int
    size: int
    is_file: bool


@dataclass
class Sample:
    """Consecutive entries of one stem.

    Attributes:
        extents: where each entry is, by ending.
        data: the bytes of the wanted entries, by ending.
        cut: the ending of the entry that the shard ends in, if any.
        torn: whether it stands beside a damaged stretch, which may hold some of its entries.
    """

    key: str
    extents: dict[str, Extent] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    cut: str | None = None
    torn: bool = False


class ShardReader(tarfile.TarFile):
    """Reads the samples of a shard, and those after a damaged stretch too.

    Plain `tarfile` takes a damaged header, and a hole of zeros, for the end of the archive, and so
    would lose every sample after it without a word.

    Args:
        file: an uncompressed tar, open for random access.

    Attributes:
        damage: the damaged stretches met so far.
        readable: the bytes of the entries met so far.

    Raises:
        tarfile.TarError: the file is empty, or holds no entry at all and is not an empty tar.
    """

    fileobj: IO[bytes]

    def __init__(self, file: IO[bytes]) -> None:
        self.damage: list[Damage] = []
        self.readable = 0
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if self.size == 0:
            raise tarfile.ReadError("it is empty")
        super().__init__(fileobj=file, mode="r")
        if self.firstmember is None and self.damage:
            raise tarfile.ReadError("it is not a tar")

    def next(self) -> Entry | None:  # type: ignore[override]
        """Return the next entry; unlike the base class, go on after damage, and keep no entry."""
        first: Entry | None = getattr(self, "firstmember", None)
        if first is not None:
            self.firstmember = None
            return first
        start = self.offset
        zeros = damaged = 0
        while len(block := self._block()) == _BLOCK:
            entry = self._plain_entry(block)
            if entry is None and block == _ZEROS:
                zeros += 1
            elif entry is None and (entry := self._any_entry()) is None:
                damaged += 1
            if entry is not None:
                self._note(start, zeros, damaged)
                self.readable += self.offset - entry.start
                return entry
            self.offset += _BLOCK
        if start > self.size:
            self.damage.append(Damage(self.size, 0, "it ends inside an entry"))
        elif not zeros and not damaged:
            self.damage.append(Damage(start, 0, "it ends without the end mark of a tar"))
        self._note(start, zeros, damaged)
        return None

    def _plain_entry(self, block: bytes) -> Entry | None:
        """Read the header of a file in the form that nearly all have, and move on past the file.

        This takes a tenth of the time of `tarfile`, which reads every field. None leaves the header
        to `_any_entry`.
        """
        start = offset = self.offset
        if block[156] == _PAX:
            # webdataset's writer puts one before each file, for the fraction of a second.
            size = _plain_size(block)
            if size is None or size > _MOST_PAX:
                return None
            padded = -(-size // _BLOCK) * _BLOCK
            data = self.fileobj.read(padded + _BLOCK)
            if _TELLING_PAX.search(data, 0, size):
                return None
            block = data[padded:]
            offset += _BLOCK + padded
        if len(block) < _BLOCK or block[156] not in _FILES or block[345]:
            return None
        size = _plain_size(block)
        name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        if size is None or name.endswith("/"):
            return None
        offset += _BLOCK
        self.offset = offset + -(-size // _BLOCK) * _BLOCK
        return Entry(name, start, offset, size, True)

    def _any_entry(self) -> Entry | None:
        """Read a header of any kind, and move on past its entry; None if it is damaged."""
        self.fileobj.seek(self.offset)
        try:
            member = tarfile.TarInfo.fromtarfile(self)
        # Damaged extended headers raise errors of many kinds.
        except (tarfile.HeaderError, ValueError, KeyError, IndexError, zlib.error):
            return None
        return Entry(member.name, member.offset, member.offset_data, member.size, member.isfile())

    def samples(self, wanted: Collection[str]) -> Iterator[Sample]:
        """Yield the samples of the shard; the entries with a `wanted` ending with their bytes."""
        sample: Sample | None = None
        known = 0
        while (entry := self.next()) is not None:
            torn, known = len(self.damage) > known, len(self.damage)
            if torn and sample is not None:
                sample.torn = True
            parts = split_entry(entry.name)
            if not entry.is_file or parts is None:
                continue
            key, ending = parts
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key, torn=torn)
            if entry.offset + entry.size > self.size:
                sample.cut = ending
                continue
            sample.extents[ending] = Extent(entry.offset, entry.size)
            if ending in wanted:
                self.fileobj.seek(entry.offset)
                sample.data[ending] = self.fileobj.read(entry.size)
        if sample is not None:
            sample.torn |= len(self.damage) > known
            yield sample

    def _block(self) -> bytes:
        self.fileobj.seek(self.offset)
        return self.fileobj.read(_BLOCK)

    def _note(self, start: int, zeros: int, damaged: int) -> None:
        size = (zeros + damaged) * _BLOCK
        if damaged:
            self.damage.append(Damage(start, size, "headers cannot be read"))
        elif zeros > _MOST_PADDING:
            self.damage.append(Damage(start, size, "a hole of zeros"))


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


def split_entry(path: str) -> tuple[str, str] | None:
    """Split `dir/key.ending` into (`dir/key`, `ending`) at the first dot of the file name.

    This is how WebDataset groups files into samples; None for files that it ignores.
    """
    folder, _, file = path.rpartition("/")
    stem, dot, ending = file.partition(".")
    if not stem or not dot or stem.startswith("__"):
        return None
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def count_lost(
    shard: str, found: int, *, torn: int, readable: int, damage: list[Damage], usual: int
) -> int:
    """Return how many samples a damaged shard has lost beyond those `found`.

    That is what its index tells: `successes` of img2dataset's `00000_stats.json`, or the first line
    of DALI's `00000.idx`. Without an index it is an estimate from below: what is missing to the
    `usual` number, or what the unreadable bytes would have held, but at least one if no sample
    found is torn.

    Args:
        shard: path or URL.
        found: samples found in it, torn ones included.
        torn: those of them whose image or caption is lost.
        readable: the bytes of these samples.
        damage: its damaged stretches.
        usual: samples in an undamaged shard of the same set; 0 if there is none.
    """
    indexed = _read_index(shard)
    if indexed is not None:
        return max(indexed - found, 0)
    unreadable = sum(stretch.size for stretch in damage)
    by_bytes = round(unreadable * found / max(readable, 1)) - torn
    return max(usual - found, by_bytes, 0 if torn else 1)


def _read_index(shard: str) -> int | None:
    stem = Path(shard.removesuffix(".tar"))
    try:
        statistics = stem.with_name(f"{stem.name}_stats.json")
        if statistics.is_file():
            return int(json.loads(statistics.read_bytes())["successes"])
        index = stem.with_name(f"{stem.name}.idx")
        if index.is_file():
            with index.open(encoding="utf-8") as file:
                return int(file.readline().split()[1])
    # Not an index of that kind.
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    return None


@contextmanager
def open_sequential(
    shard: str, remote: RemoteShard | None = None, cache: ShardCache | None = None
) -> Iterator[tuple[IO[bytes], Damage | None]]:
    """Open a compressed shard or a pipe, copied to a temporary file and decompressed there.

    Args:
        shard: its path, URL or pipe.
        remote, cache: what is at the URL, and where to read that from.

    Yields:
        The file, and where the compressed data is damaged.

    Raises:
        OSError, and errors of their own from pipes.
    """
    from webdataset.gopen import gopen

    with ExitStack() as stack:
        if os.path.isfile(shard):
            raw: IO[bytes] = stack.enter_context(open(shard, "rb"))
        elif remote is not None and cache is not None:
            raw = stack.enter_context(cache.open(remote))
        else:
            raw = stack.enter_context(tempfile.TemporaryFile())
            with gopen(shard) as stream:
                shutil.copyfileobj(stream, raw)
            raw.seek(0)
        start = raw.read(6)
        raw.seek(0)
        if start.startswith(_ZSTD):
            raise OSError(f"zstd is not supported here; give 'pipe:zstd -dc {shard}'")
        for magic, decompress in _DECOMPRESSORS:
            if start.startswith(magic):
                plain = stack.enter_context(tempfile.TemporaryFile())
                with decompress(raw) as packed:
                    damage = _decompress(packed, plain)
                yield plain, damage
                return
        yield raw, None


def _decompress(
    packed: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile, plain: IO[bytes]
) -> Damage | None:
    try:
        # In single blocks, so that all of them before the damage are kept.
        while block := packed.read(_BLOCK):
            plain.write(block)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        return Damage(plain.tell(), 0, f"its compressed data is damaged: {error}")
    return None
