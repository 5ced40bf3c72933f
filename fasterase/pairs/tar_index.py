"""The samples of tar shards, read past damage, and the index of them, an Arrow file for each shard.

A small set is indexed in memory whenever it is opened. The index of a larger one is kept in the
hidden folder `.fasterase` beside the shards, or in the user's cache folder if that cannot be
written. Only a shard whose size or time of change differs from what its index says, or whose index
is damaged, is indexed again. The index of remote shards is always kept, in the user's cache folder,
and recognised by the shard's size and version; opening it again reads no shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import statistics
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock

from fasterase.errors import FaseraseError, InputError
from fasterase.pairs.processes import count_processes, process_pool
from fasterase.pairs.remote import RemoteError, Shard, shard_name
from fasterase.pairs.table import Part, make_batch
from fasterase.pairs.tar_reader import Damage, ShardReader
from fasterase.progress import progress_bar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bytes of shards from which on their index is kept: fewer are indexed within about a second.
KEPT_BYTES = 128 << 20
_FOLDER = ".fasterase"
_EXTENTS = ("offset", "size", "json_offset", "json_size")


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

    def image_of(self, sample: Mapping[str, T]) -> T | None:
        """Return the sample's image entry, None if it has none."""
        return next((sample[ending] for ending in self.image if ending in sample), None)


def read_rows(
    shard: Shard,
    file: IO[bytes],
    entries: Entries,
    *,
    damage: Sequence[Damage] = (),
    images: list[bytes | None] | None = None,
) -> Part:
    """Return the samples of a shard that have an image or a caption.

    What is known of the shard (`Part.facts`): its name (`shard`), size, version; how many samples
    have images and captions, and are `torn`: have lost one of the two to damage; the bytes that are
    `readable`; the stretches of `damage`; why the last sample is `cut` off, if it is; the `endings`
    of all entries; the `digest` of ids, sizes and captions.

    Args:
        file: the shard, decompressed.
        entries: which entries are images and captions.
        damage: what is known to be damaged already.
        images: gets the image of each sample; the rows get the json entries as `metadata` then.

    Raises:
        tarfile.TarError: it is no tar.
    """
    reader, name = ShardReader(file), shard_name(shard.place)
    known = {*entries.image, *entries.text}
    wanted = {*entries.text, "json"} if entries.json_field else set(entries.text)
    if images is not None:
        wanted |= {*entries.image, "json"}
    ids: list[str] = []
    captions: list[list[str]] = []
    extents: list[int] = []
    metadata: list[bytes] = []
    spans: list[tuple[int, int]] = []
    endings: set[str] = set()
    cut = ""
    for stem, sample in reader.samples():
        endings |= sample.keys()
        if sample.keys().isdisjoint(known):
            continue
        *_, (ending, last) = sample.items()
        spans.append((next(iter(sample.values())).offset, last.offset_data + last.size))
        if spans[-1][1] > reader.size:
            cut = f"the shard ends inside its {ending}"
            del sample[ending]
        data = {ending: reader.read(sample[ending]) for ending in wanted & sample.keys()}
        ids.append(f"{name}/{stem}")
        captions.append([] if cut else entries.read_captions(data))
        for entry in (entries.image_of(sample), sample.get("json")):
            extents += (-1, -1) if entry is None else (entry.offset_data, entry.size)
        if images is not None:
            images.append(entries.image_of(data))
            metadata.append(_dump_object(data.get("json", b"")))
    part = _make_part(ids, captions, extents, None if images is None else metadata)
    incomplete = (
        span
        for span, texts, offset in zip(spans, captions, extents[::4], strict=True)
        if offset < 0 or not texts
    )
    part.facts = {
        "shard": name,
        "size_bytes": shard.size,
        "version": shard.version,
        "images": sum(offset >= 0 for offset in extents[::4]),
        "captioned": sum(map(bool, captions)),
        "torn": sum(any(each.touches(*span) for each in reader.damage) for span in incomplete),
        "readable": reader.readable,
        "damage": [*map(list, damage), *map(list, reader.damage)],
        "cut": cut,
        "endings": sorted(endings),
        "digest": part.digest(),
    }
    return part


def _dump_object(data: bytes) -> bytes:
    """Normalise a json entry; anything but an object becomes an empty one."""
    try:
        value = json.loads(data)
    except ValueError:
        return b""
    return json.dumps(value).encode() if isinstance(value, dict) else b""


def _make_part(
    ids: list[str], captions: list[list[str]], extents: list[int], metadata: list[bytes] | None
) -> Part:
    columns = dict(zip(_EXTENTS, np.array(extents, np.int64).reshape(-1, 4).T, strict=True))
    if metadata is not None:
        columns["metadata"] = metadata
    return Part(make_batch(ids, captions, **columns), {})


def add_lost(name: str, shards: Sequence[Shard], parts: list[Part]) -> dict[int, str]:
    """Add a part for the samples that damaged shards have lost, and warn.

    Returns:
        row -> why its sample cannot be read.
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
            f"`{name}`: shard {shard.place} is damaged ({where}). At least {lost + facts['torn']} "
            f"of its samples cannot be used and count as skipped, {len(part) - facts['torn']} can. "
            f"Fetch or write it again.",
            stacklevel=2,
        )
    if lost := len(ids):
        parts.append(_make_part(ids, [[]] * lost, [-1] * 4 * lost, [b""] * lost))
    return broken | dict(enumerate(reasons, start))


def _count_lost(place: str, part: Part, usual: int) -> int:
    """Return how many samples a damaged shard has lost beyond those found.

    That is what its index tells: `successes` of img2dataset's `00000_stats.json`, or the first line
    of DALI's `00000.idx`. Without an index it is an estimate from below: what is missing to the
    `usual` number of an undamaged shard (0 if there is none), or what the unreadable bytes would
    have held, but at least one if no sample found is torn.
    """
    stem = place.removesuffix(".tar")
    # Either may be missing, or of another kind.
    with suppress(OSError, ValueError, KeyError, TypeError):
        stated = json.loads(Path(f"{stem}_stats.json").read_bytes())["successes"]
        return max(int(stated) - len(part), 0)
    with suppress(OSError, ValueError, IndexError):
        first = Path(f"{stem}.idx").read_text(encoding="utf-8").splitlines()[0]
        return max(int(first.split()[1]) - len(part), 0)
    torn, unreadable = part.facts["torn"], sum(size for _, size, _ in part.facts["damage"])
    by_bytes = round(unreadable * len(part) / max(part.facts["readable"], 1)) - torn
    return max(usual - len(part), by_bytes, 0 if torn else 1)


def index_shards(shards: Sequence[Shard], *, name: str, entries: Entries) -> list[Part]:
    """Open the index of uncompressed shards; make what is missing of it.

    Several processes, on several machines too, may do so at once: they share the work, and none
    sees a part of a file.

    Args:
        shards: files and URLs.
        name: the argument that the shards were given as.
        entries: which entries are images and captions.

    Raises:
        InputError: a shard cannot be read, or there are no samples, no images or no captions.
    """
    distinct = list(dict.fromkeys(shards))
    is_remote = any(shard.cache is not None for shard in distinct)
    kept = is_remote or sum(shard.size for shard in distinct) >= KEPT_BYTES
    opened = {shard: _find(shard, entries) if kept else None for shard in distinct}
    found = {shard: part for shard, part in opened.items() if part is not None}
    missing = [shard for shard in distinct if shard not in found]
    try:
        with progress_bar(f"indexing {name}", total=len(missing), unit="shard", delay=2) as bar:
            for shard, part in _index(missing, entries, kept=kept):
                found[shard] = part
                bar.update()
    except InputError as error:
        raise InputError(f"`{name}`: {error}") from error
    parts = [found[shard] for shard in shards]
    check_parts(name, parts, entries)
    return parts


def check_parts(name: str, parts: Sequence[Part], entries: Entries) -> None:
    """Raise `InputError` if there are no samples, no images or no captions."""
    facts = [part.facts for part in parts]
    found = ", ".join(sorted({ending for each in facts for ending in each["endings"]})) or "none"
    image, text = (";".join(endings) for endings in entries[:2])
    if not any(map(len, parts)):
        raise InputError(f"`{name}`: the shards hold no samples; entries found: {found}")
    if not any(each["images"] for each in facts):
        raise InputError(
            f"`{name}`: no images under {image}; entries found: {found}. Name the right ending "
            f"with `image_key`."
        )
    if not any(each["captioned"] for each in facts):
        raise InputError(
            f"`{name}`: no captions under {text}; entries found: {found}. Name the right "
            f"ending, or a field of the json entry, with `text_key`."
        )


def _index(shards: list[Shard], entries: Entries, *, kept: bool) -> Iterator[tuple[Shard, Part]]:
    """Yield each shard with its rows, perhaps read in several processes."""
    workers = count_processes(len(shards)) if kept else 1
    read = partial(_make_index if kept else _read_shard, entries=entries)
    if workers < 2:
        yield from ((shard, read(shard)) for shard in shards)
        return
    # Other processes may start together with this one; so they meet at few shards.
    random.Random(os.getpid()).shuffle(shards)
    with process_pool(workers) as pool:
        yield from zip(shards, pool.map(read, shards), strict=True)


def _make_index(shard: Shard, entries: Entries) -> Part:
    """Index a shard and write its index, unless another process does so now.

    Rows that cannot be written, since a disk is full or read-only, stay in memory.
    """
    path = index_path(shard.place, entries)
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        return _read_shard(shard, entries)
    try:
        part = _open(path, shard)
        if part is not None:
            return part
        part = _read_shard(shard, entries)
        try:
            return part.save(path)
        except (FaseraseError, OSError) as error:
            log.warning("Shard index: %s", error)
            return part
    finally:
        # Safe to unlink: waiters and later lockers find the index.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _read_shard(shard: Shard, entries: Entries) -> Part:
    try:
        with shard.open() as file:
            return read_rows(shard, file, entries)
    except RemoteError as error:
        raise InputError(str(error)) from error
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"shard {shard.place} cannot be read: {error}") from error


def _find(shard: Shard, entries: Entries) -> Part | None:
    """Open the index of a shard, wherever it is kept; None if it has to be made."""
    paths = _paths(shard.place, entries)
    return next(filter(None, (_open(path, shard) for path in paths)), None)


def _open(path: Path, shard: Shard) -> Part | None:
    try:
        part = Part.open(str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("Shard index: %s is damaged (%s) and is made again.", path, error)
        return None
    if (part.facts["size_bytes"], part.facts.get("version")) != shard[1:3]:
        log.info("Shard index: %s has changed and is indexed again.", shard.place)
        return None
    return part


def _paths(place: str, entries: Entries) -> list[Path]:
    """Return where an index may be: beside its shard if that is local, and in the user's cache.

    Other entries of one shard make other files.
    """
    chosen = hashlib.blake2b(repr(entries).encode(), digest_size=4).hexdigest()
    file = f"{shard_name(place)}.{chosen}.arrow"
    is_local = "://" not in place
    parent = Path(place).parent
    whole = parent.resolve() if is_local else place
    folder = hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cached = cache / "fasterase" / "shards" / folder / file
    return [parent / _FOLDER / file, cached] if is_local else [cached]


def index_path(place: str, entries: Entries) -> Path:
    """Return where the index of the shard at a path or URL is written."""
    paths = _paths(place, entries)
    can_write = len(paths) > 1 and os.access(Path(place).parent, os.W_OK)
    return paths[0 if can_write else -1]
