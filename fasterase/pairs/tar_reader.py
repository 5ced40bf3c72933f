"""One tar shard, read past damage: its samples as rows, and the stretches that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import statistics
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

import numpy as np

from fasterase.errors import hide_secrets
from fasterase.pairs.images import read_ends, read_regular_file
from fasterase.pairs.remote import Shard, shard_name
from fasterase.pairs.table import Part, make_batch

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


class Entry(NamedTuple):
    """An entry of a tar: its name, and where its header, its content and the next entry begin."""

    name: str
    is_file: bool
    offset: int
    data_offset: int
    size: int
    end: int


class ShardReader:
    """Reads the entries of an uncompressed shard of `size` bytes, also those after damage.

    `damage` holds the damaged stretches met so far, `readable` is the bytes of the entries.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.damage: list[Damage] = []
        self.readable = 0
        self.size = file.seek(0, os.SEEK_END)
        self._file = file
        self._tar = tarfile.TarFile(fileobj=file, mode="w")  # to write, since it reads nothing then

    def entries(self) -> Iterator[Entry]:
        """Yield all entries; note the stretches between that are none.

        tarfile.TarError: the file is empty, or holds no entry at all and is not an empty tar.
        """
        if self.size < _BLOCK:
            raise tarfile.ReadError("it is not a tar" if self.size else "it is empty")
        end = place = 0
        while place + _BLOCK <= self.size:
            entry = self._read_plain_header(place) or self._read_header(place)
            if entry is None:
                place += _BLOCK
                continue
            self._note_gap(end, place)
            end = place = entry.end
            self.readable += entry.end - entry.offset
            yield entry
        if end > self.size:
            self.damage.append(Damage(self.size, 0, "it ends inside an entry"))
        elif self.size - end < _BLOCK:
            self.damage.append(Damage(end, 0, "it ends without the end mark of a tar"))
        else:
            self._note_gap(end, self.size - self.size % _BLOCK)
        if self.damage and not self.readable:
            raise tarfile.ReadError("it is not a tar")

    def _read_plain_header(self, offset: int) -> Entry | None:
        """Return a usual file, in a tenth of tarfile's time; None for anything else."""
        self._file.seek(offset)
        block, data_offset = self._file.read(_BLOCK), offset + _BLOCK
        size = _plain_size(block)
        # webdataset's writer puts an extended header before each file, for fractions of seconds.
        if size is not None and block[156] == _PAX:
            records = self._file.read(size + -size % _BLOCK)
            if _TELLING_PAX.search(records, 0, size):
                return None
            block, data_offset = self._file.read(_BLOCK), data_offset + len(records) + _BLOCK
            size = _plain_size(block)
        name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        if size is None or block[156] not in _FILES or block[345] or name.endswith("/"):
            return None
        return Entry(name, True, offset, data_offset, size, data_offset + size + -size % _BLOCK)

    def _read_header(self, offset: int) -> Entry | None:
        """Return an entry of any kind; None where no header is."""
        self._file.seek(offset)
        try:
            header = tarfile.TarInfo.fromtarfile(self._tar)
        # Damaged extended headers raise errors of many kinds, after reading on.
        except (tarfile.HeaderError, ValueError, KeyError, IndexError):
            return None
        end = self._tar.offset
        if end <= offset:  # a negative size
            return None
        return Entry(header.name, header.isfile(), offset, header.offset_data, header.size, end)

    def _note_gap(self, start: int, end: int) -> None:
        if start == end:
            return
        self._file.seek(start)
        blocks = range(start, end, tarfile.RECORDSIZE)
        if any(self._file.read(min(tarfile.RECORDSIZE, end - at)).strip(b"\0") for at in blocks):
            self.damage.append(Damage(start, end - start, "headers cannot be read"))
        elif end - start > _MOST_PADDING:
            self.damage.append(Damage(start, end - start, "a hole of zeros"))

    def samples(self) -> Iterator[tuple[str, dict[str, Entry]]]:
        """Yield the stem of each sample, consecutive entries of one stem, and these by ending.

        An ending that comes again begins another sample.
        """
        last, sample = "", dict[str, Entry]()
        for entry in self.entries():
            if not entry.is_file or (parts := split_entry(entry.name)) is None:
                continue
            stem, ending = parts
            if sample and (stem != last or ending in sample):
                yield last, sample
                sample = {}
            last, sample[ending] = stem, entry
        if sample:
            yield last, sample

    def read(self, entry: Entry) -> bytes:
        self._file.seek(entry.data_offset)
        return self._file.read(entry.size)


def _plain_size(block: bytes) -> int | None:
    """Return the size in a header of 512 bytes; None if it or the checksum has a rare form."""
    if len(block) < _BLOCK or block[257:262] != b"ustar":
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


def read_whole(stream: IO[bytes], place: str) -> tuple[bytes, tuple[Damage, ...]]:
    """Return a shard read to its end, decompressed, and where its compressed data is damaged.

    `stream`, a file or a pipe of webdataset, gets closed; pipes raise errors of their own.
    """
    with stream:
        data = stream.read()
    if data.startswith(_ZSTD):
        raise OSError(f"zstd is not supported here; give 'pipe:zstd -dc {place}'")
    decompress = next((each for magic, each in _DECOMPRESSORS if data.startswith(magic)), None)
    if decompress is None:
        return data, ()
    plain = io.BytesIO()
    try:
        # In single blocks, so that all of them before the damage are kept.
        with decompress(io.BytesIO(data)) as packed:
            while block := packed.read(_BLOCK):
                plain.write(block)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = f"its compressed data is damaged: {error}"
        return plain.getvalue(), (Damage(plain.tell(), 0, reason),)
    return plain.getvalue(), ()


class Entries(NamedTuple):
    """The entries of a sample that are its image and its caption: the first of these endings.

    If there is no text entry, the caption is a field of the json entry; "" for none.
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
        except (KeyError, TypeError, ValueError, RecursionError):
            return []
        values = value if isinstance(value, list) else [value]
        return [text for text in values if isinstance(text, str)]


def read_rows(shard: Shard, file: IO[bytes], entries: Entries) -> Part:
    """Return the samples of a shard that have an image or a caption.

    What is known of the shard (`Part.facts`): its name (`shard`), size, version; how many samples
    have images and captions, and are `torn`: have lost one of the two to damage; the bytes that are
    `readable`; the stretches of `damage`; why the last sample is `cut` off, if it is; the `endings`
    of all entries; the `digest` of ids, sizes, captions and both ends of images.
    tarfile.TarError: it is no tar.
    """
    reader, name = ShardReader(file), shard_name(shard.place)
    wanted = {*entries.text, "json"} if entries.json_field else set(entries.text)
    ids: list[str] = []
    captions: list[list[str]] = []
    extents: list[int] = []
    incomplete: list[tuple[int, int]] = []
    endings: set[str] = set()
    cut, content = "", 0
    for stem, sample in reader.samples():
        endings |= sample.keys()
        if sample.keys().isdisjoint((*entries.image, *entries.text)):
            continue
        *_, (ending, last) = sample.items()
        span = next(iter(sample.values())).offset, last.data_offset + last.size
        if span[1] > reader.size:
            cut = f"the shard ends inside its {ending}"
            del sample[ending]
        image = next((sample[ending] for ending in entries.image if ending in sample), None)
        if image is not None:
            # Before the captions, which usually follow it and are read with its end.
            content = zlib.crc32(read_ends(file, image.data_offset, image.size), content)
        texts = {ending: reader.read(sample[ending]) for ending in wanted & sample.keys()}
        ids.append(f"{name}/{stem}")
        captions.append([] if cut else entries.read_captions(texts))
        for entry in (image, sample.get("json")):
            extents += (-1, -1) if entry is None else (entry.data_offset, entry.size)
        if image is None or not captions[-1]:
            incomplete.append(span)
    part = make_part(ids, captions, extents)
    part.facts = {
        "shard": name,
        "size_bytes": shard.size,
        "version": shard.version,
        "images": sum(offset >= 0 for offset in extents[::4]),
        "captioned": sum(map(bool, captions)),
        "torn": sum(any(each.touches(*span) for each in reader.damage) for span in incomplete),
        "readable": reader.readable,
        "damage": [*map(list, shard.damage), *map(list, reader.damage)],
        "cut": cut,
        "endings": sorted(endings),
        "digest": f"{part.digest()}{content:08x}",
    }
    return part


def make_part(ids: list[str], captions: list[list[str]], extents: list[int]) -> Part:
    """Return rows in memory; offset and size of image and json entry of each are in `extents`."""
    columns = np.array(extents, np.int64).reshape(-1, 4).T
    names = ("offset", "size", "json_offset", "json_size")
    return Part(make_batch(ids, captions, **dict(zip(names, columns, strict=True))), {})


def add_lost(name: str, shards: Sequence[Shard], parts: list[Part]) -> dict[int, str]:
    """Add a part for the samples that damaged shards have lost, and warn.

    Returns row -> why its sample cannot be read.
    """
    undamaged = [len(part) for part in parts if not part.facts["damage"]]
    usual = round(statistics.median(undamaged)) if undamaged else 0
    broken: dict[int, str] = {}
    ids: list[str] = []
    reasons: list[str] = []
    start = 0
    for shard, part in zip(shards, parts, strict=True):
        facts = part.facts
        start += len(part)
        if facts["cut"]:
            broken[start - 1] = facts["cut"]
        if not facts["damage"]:
            continue
        lost = _count_lost(shard.place, part, usual)
        where = "; ".join(f"byte {offset}: {reason}" for offset, _, reason in facts["damage"])
        ids += [f"{facts['shard']}/lost sample {number}" for number in range(1, lost + 1)]
        reasons += [f"lost from a damaged shard ({where})"] * lost
        warnings.warn(
            f"`{name}`: shard {hide_secrets(shard.place)} is damaged ({where}). At least "
            f"{lost + facts['torn']} of its samples cannot be used and count as skipped, "
            f"{len(part) - facts['torn']} can. "
            f"Fetch or write it again.",
            stacklevel=2,
        )
    if lost := len(ids):
        parts.append(make_part(ids, [[]] * lost, [-1] * 4 * lost))
    return broken | dict(enumerate(reasons, start))


def _count_lost(place: str, part: Part, usual: int) -> int:
    """Return how many samples a damaged shard has lost beyond those found.

    Its index tells: `successes` of img2dataset's `00000_stats.json`, or the first line of DALI's
    `00000.idx`. Without one it is at least what is missing to the `usual` number of an undamaged
    shard (0 if there is none), what the unreadable bytes would have held, and one if none is torn.
    """
    stem = place.removesuffix(".tar")
    # Either may be missing, or of another kind.
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        stated = json.loads(read_regular_file(f"{stem}_stats.json"))["successes"]
        return max(int(stated) - len(part), 0)
    with suppress(OSError, ValueError, IndexError):
        first = read_regular_file(f"{stem}.idx").decode().splitlines()[0]
        return max(int(first.split()[1]) - len(part), 0)
    torn, unreadable = part.facts["torn"], sum(size for _, size, _ in part.facts["damage"])
    by_bytes = round(unreadable * len(part) / max(part.facts["readable"], 1)) - torn
    return max(usual - len(part), by_bytes, 0 if torn else 1)
