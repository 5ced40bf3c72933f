"""Measure what is done with tar shards, against webdataset's plain pipeline on the same shards.

    python -m benchmarks.pairs [--pairs N --large N --repeats N --only STAGE ...]

The shards are made first, in a temporary folder: copies of one of 10,000 small pairs in the layout
of img2dataset (jpg, txt, json), written by webdataset's own writer. They are in the page cache when
they are read. Each measurement has a process of its own; the implementations take turns.

    index    find all samples of N pairs and read their captions. fasterase: index the shards, in as
             many processes as there are cores; webdataset: iterate over two shards, in one process
    open     open the same shards again; only fasterase keeps what it found
    split    the pairs with a word in their caption
    decode   read and decode images and captions, in one process: fasterase at random, webdataset in
             order
    step     the same, with preprocessing to 224 pixels and tokens, in batches of 256
    sweep    the same, in order, as features are computed once before a run
    draft    decode JPEGs of 512 x 512 pixels, whole or as a draft of half the size (a scaled DCT);
             `difference` is the mean of what that changes in pixels (0 to 255) of 224 x 224

and for an index of `--large` pairs, whose captions are synthesised and whose shards are empty files
of the right size, since nothing reads them:

    large open     open it
    large draw     what a step draws: the sampler's rows, their captions and their places; `step_ms`
                   is the median of the processor time
    large split    `fasterase.split` by an expression
    large overlap  `remove_overlap` of all pairs and a hundredth of them

Every row of benchmarks/results/pairs.csv is one measurement: wall and processor seconds (of all
processes), pairs per second of both, and peak resident memory above that before.
"""

from __future__ import annotations

import io
import os
import re
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image

from benchmarks.command import exit_with, new_parser
from benchmarks.processes import call_in_process
from benchmarks.result_files import (
    RESULTS,
    code_version,
    device_name,
    group_rows,
    read_csv,
    write_csv,
)
from fasterase.models.preprocessing import wrap_tokenizer, wrap_transform
from fasterase.pairs.batches import sweep
from fasterase.pairs.items import Record
from fasterase.pairs.overlap import remove_overlap
from fasterase.pairs.prepare import Preparer, stack_tokens
from fasterase.pairs.read_tars import TarTable, index_paths, open_tars
from fasterase.pairs.sampler import Sampler
from fasterase.pairs.split import split
from fasterase.pairs.table import PairTable, Part
from fasterase.planner.count import PeakMemory

SHARD_PAIRS = 10_000
_PICTURES = 2_000  # pairs with images of 256 x 256 pixels, for `decode`, `step` and `sweep`
_PHOTOS = 500  # with images of 512 x 512 pixels, for `draft`
_BATCH = 256
_STEPS = 200  # drawn from the large index
_THEIR_SHARDS = 2  # that webdataset indexes and splits: it reads all at one rate
_WORD = "apple"
_SENTENCE = (
    "a photo of the small red apple and green pear on table with two dogs in garden near old house "
    "by sea blue sky white wall black cat street market people city"
)
_FIGURES = (
    *("seconds", "cpu_seconds", "peak_mib", "pairs", "pairs_per_second", "pairs_per_cpu_second"),
    *("found", "step_ms", "difference"),
)
_LIMIT_SECONDS = 3600.0
_PRELOAD = ["fasterase.pairs.split", "open_clip", "webdataset"]


def write_shards(folder: Path, *, shards: int, pairs: int, side: int) -> list[str]:
    """Write copies of one shard of `pairs` pairs with images of `side` x `side` pixels."""
    numbers = np.random.default_rng(0)
    images = [_encode(numbers, side) for _ in range(50)]
    first = folder / "00000.tar"
    with webdataset.TarWriter(str(first)) as writer:
        for number in range(pairs):
            caption = " ".join(numbers.choice(_SENTENCE.split(), 15))
            url = f"https://example.org/images/{number:09d}.jpg"
            meta: dict[str, Any] = {"caption": caption, "url": url, "key": f"{number:09d}"}
            meta |= {"status": "success", "error_message": None, "width": side, "height": side}
            meta |= {"original_width": 2 * side, "original_height": 2 * side}
            meta |= {"exif": "{}", "sha256": "0" * 64}
            sample = {"jpg": images[number % len(images)], "txt": caption, "json": meta}
            writer.write({"__key__": f"{number:09d}", **sample})
    paths = [first, *(folder / f"{number:05d}.tar" for number in range(1, shards))]
    for path in paths[1:]:
        shutil.copyfile(first, path)
    return list(map(str, paths))


def _encode(numbers: np.random.Generator, side: int) -> bytes:
    """Return a JPEG of smooth colours with some detail, as large in bytes as a photograph."""
    coarse = Image.fromarray(numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    noise = numbers.integers(-12, 13, (side, side, 1))
    buffer = io.BytesIO()
    picture = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_large(folder: Path, shard: str, *, pairs: int) -> list[str]:
    """Write an index of `pairs` pairs, by copies of that of `shard`, over empty files."""
    opened = _open([shard])
    (source,) = opened.parts.every
    paths = []
    for number in range(-(-pairs // len(source))):
        path = folder / f"{number:05d}.tar"
        with path.open("wb") as file:
            file.truncate(source.facts["size_bytes"])
        changed = {"shard": path.name, "version": str(path.stat().st_mtime_ns)}
        target = index_paths(str(path), opened.images.entries)[0]
        target.parent.mkdir(exist_ok=True)
        Part(source.batch, source.facts | changed).save(target)
        paths.append(str(path))
    return paths


def _open(shards: list[str]) -> TarTable:
    pairs = open_tars(shards, name="retain")
    assert isinstance(pairs, TarTable)
    return pairs


@contextmanager
def _measured() -> Iterator[dict[str, Any]]:
    """Yield a row that gets, after the block, seconds of wall and processor and peak memory."""
    row: dict[str, Any] = {}
    memory, processor, start = PeakMemory("cpu"), _processor_seconds(), time.perf_counter()
    yield row
    row["seconds"] = time.perf_counter() - start
    row["cpu_seconds"] = _processor_seconds() - processor
    row["peak_mib"] = memory.bytes() / 2**20


def _processor_seconds() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def index_ours(shards: list[str]) -> dict[str, Any]:
    """Index the shards anew."""
    shutil.rmtree(Path(shards[0]).parent / ".fasterase", ignore_errors=True)
    return open_ours(shards)


def open_ours(shards: list[str]) -> dict[str, Any]:
    """Open the shards, whose index is kept."""
    with _measured() as row:
        pairs = _open(shards)
    return row | {"pairs": len(pairs)}


def index_theirs(shards: list[str]) -> dict[str, Any]:
    """Iterate over the samples, undecoded."""
    shards = shards[:_THEIR_SHARDS]
    with _measured() as row:
        found = sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False))
    return row | {"pairs": found}


def split_ours(shards: list[str]) -> dict[str, Any]:
    """Split by an expression."""
    pairs = _open(shards)
    with _measured() as row:
        forget, _ = split(pairs, forget=rf"\b{_WORD}\b")
    return row | {"pairs": len(pairs), "found": len(forget)}


def split_theirs(shards: list[str]) -> dict[str, Any]:
    """Select by an expression."""
    search = re.compile(rf"\b{_WORD}\b".encode(), re.IGNORECASE).search
    shards = shards[:_THEIR_SHARDS]
    with _measured() as row:
        seen = found = 0
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            seen += 1
            found += search(sample["txt"]) is not None
    return row | {"pairs": seen, "found": found}


def decode_ours(shards: list[str]) -> dict[str, Any]:
    """Read all pairs at random."""
    pairs = _open(shards)
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    with _measured() as row:
        for number in order:
            image, _ = pairs[number]
            assert image.size
    return row | {"pairs": len(pairs)}


def decode_theirs(shards: list[str]) -> dict[str, Any]:
    """Read all pairs in order."""
    with _measured() as row:
        stream = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
        read = sum(1 for _ in stream.to_tuple("jpg", "txt", "json"))
    return row | {"pairs": read}


def _preparer() -> Preparer:
    transform, tokenizer = _preprocessing()
    return Preparer(
        wrap_transform(transform, (224, 224)),
        wrap_tokenizer(tokenizer, 77, 49408, with_mask=False),
        (224, 224),
        context_length=77,
        vocab_size=49408,
    )


def step_ours(shards: list[str]) -> dict[str, Any]:
    """Load batches as a step does, without workers."""
    torch.set_num_threads(1)  # as in a worker of a DataLoader
    preparer = _preparer()
    pairs = _open(shards)
    rows = np.random.default_rng(0).permutation(len(pairs))
    with _measured() as row:
        for start in range(0, len(rows), _BATCH):
            records = [pairs[i] for i in rows[start : start + _BATCH].tolist()]
            preparer.stack([preparer.image(record) for record in records])
            stack_tokens([preparer.text(record).tokens for record in records], 77)
    return row | {"pairs": len(pairs)}


def step_theirs(shards: list[str]) -> dict[str, Any]:
    """Load batches with open_clip's own preprocessing, without workers."""
    return _load_theirs(webdataset.WebDataset(shards, shardshuffle=False).shuffle(1000))


def sweep_ours(shards: list[str]) -> dict[str, Any]:
    """Load all pairs once, as for features, without workers."""
    torch.set_num_threads(1)
    preparer = _preparer()
    pairs = _open(shards)
    rows = np.arange(len(pairs))
    with _measured() as row:
        batches = sweep(pairs, rows, preparer, captions="all", batch_size=_BATCH)
        read = sum(len(batch.rows) for batch in batches)
    return row | {"pairs": read}


def sweep_theirs(shards: list[str]) -> dict[str, Any]:
    """Load all pairs once with open_clip's own preprocessing, without workers."""
    return _load_theirs(webdataset.WebDataset(shards, shardshuffle=False))


def _load_theirs(stream: webdataset.WebDataset) -> dict[str, Any]:
    torch.set_num_threads(1)
    transform, tokenizer = _preprocessing()
    with _measured() as row:
        stream = stream.decode("pilrgb").to_tuple("jpg", "txt")
        stream = stream.map_tuple(transform, lambda text: tokenizer(text)[0])
        read = sum(len(images) for images, _ in stream.batched(_BATCH))
    return row | {"pairs": read}


def decode_photos(shards: list[str], *, draft: bool = False) -> dict[str, Any]:
    """Decode JPEGs at their size."""
    pairs = _open(shards)
    files = [pairs.encoded_image(row) for row in range(len(pairs))]
    with _measured() as row:
        for file in files:
            _decode_photo(file, draft=draft)
    if not draft:
        return row | {"pairs": len(files)}
    preparer = _preparer()
    differences = []
    for file in files[:50]:
        whole, half = (
            preparer.image(Record(_decode_photo(file, draft=each), "", "")).float()
            for each in (False, True)
        )
        differences.append(float((whole - half).abs().mean()))
    return row | {"pairs": len(files), "difference": statistics.fmean(differences)}


def decode_drafts(shards: list[str]) -> dict[str, Any]:
    """Decode JPEGs at half their size, as libjpeg can."""
    return decode_photos(shards, draft=True)


def _decode_photo(file: bytes, *, draft: bool) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    if draft:
        image.draft("RGB", (224, 224))
    image.load()
    return image


def _preprocessing() -> tuple[Any, Any]:
    return open_clip.image_transform(224, is_train=False), open_clip.SimpleTokenizer()


def _forget_and_retain(pairs: TarTable) -> tuple[PairTable, PairTable]:
    """Choose a forget set of a hundredth of the pairs; the others are the retain set."""
    chosen = np.random.default_rng(0).random(len(pairs)) < 0.01
    return pairs.where(chosen, name="forget"), pairs.where(~chosen, name="retain")


def draw_large(shards: list[str]) -> dict[str, Any]:
    """Draw steps of 64 forget and 256 retain pairs, and look their rows up."""
    pairs = _open(shards)
    forget, retain = _forget_and_retain(pairs)
    sampler = Sampler(len(forget), len(retain), forget_batch_size=64, batch_size=_BATCH, seed=0)
    sampler.draw(0)  # permutes the pairs of a pass, which takes longer than a step
    steps: list[float] = []
    with _measured() as row:
        for step in range(1, _STEPS + 1):
            start = time.thread_time()
            draw = sampler.draw(step)
            for part, rows in ((forget, draw.forget), (retain, draw.retain)):
                for number in rows.tolist():
                    part.texts(number)
                    part.encoded_location(number)
            steps.append(time.thread_time() - start)
    drawn = len(steps) * (64 + _BATCH)
    return row | {"pairs": drawn, "step_ms": 1000 * statistics.median(steps)}


def overlap_large(shards: list[str]) -> dict[str, Any]:
    """Remove a forget set from all pairs, as if both had been opened by themselves."""
    forget, _ = _forget_and_retain(_open(shards))
    pairs = _open(shards)
    with _measured() as row:
        _, removed = remove_overlap(pairs, forget)
    return row | {"pairs": len(pairs), "found": len(removed)}


Runs = dict[str, Callable[[list[str]], dict[str, Any]]]  # by implementation
# Stage -> which shards, and what is run on them.
STAGES: dict[str, tuple[str, Runs]] = {
    "index": ("small", {"fasterase": index_ours, "webdataset": index_theirs}),
    "open": ("small", {"fasterase": open_ours}),
    "split": ("small", {"fasterase": split_ours, "webdataset": split_theirs}),
    "decode": ("pictures", {"fasterase": decode_ours, "webdataset": decode_theirs}),
    "step": ("pictures", {"fasterase": step_ours, "webdataset": step_theirs}),
    "sweep": ("pictures", {"fasterase": sweep_ours, "webdataset": sweep_theirs}),
    "draft": ("photos", {"whole": decode_photos, "draft": decode_drafts}),
    "large open": ("large", {"fasterase": open_ours}),
    "large draw": ("large", {"fasterase": draw_large}),
    "large split": ("large", {"fasterase": split_ours}),
    "large overlap": ("large", {"fasterase": overlap_large}),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the measurements in a file; figures as numbers."""
    return [
        {name: float(cell) if name in _FIGURES else cell for name, cell in row.items() if cell}
        for row in read_csv(path)
    ]


def measure(stage: str, shards: list[str], *, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each run of the implementations, in turn, in processes of their own."""
    _, runs = STAGES[stage]
    for _ in range(repeats):
        for name, run in runs.items():
            figures = call_in_process(run, shards, seconds=_LIMIT_SECONDS, preload=_PRELOAD)
            row = {"stage": stage, "implementation": name, **figures}
            row["pairs_per_second"] = row["pairs"] / row["seconds"]
            row["pairs_per_cpu_second"] = row["pairs"] / row["cpu_seconds"]
            yield row


def summarise(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of medians, one line for each stage and implementation."""
    header = f"{'stage':14} {'implementation':14} {'pairs':>11} {'s':>8} {'pairs/s':>11}"
    lines = [f"{header} {'/s of CPU':>11} {'peak MiB':>9}  further"]
    for (stage, name), same in group_rows(rows, "stage", "implementation").items():
        fields = ("pairs", "seconds", "pairs_per_second", "pairs_per_cpu_second", "peak_mib")
        pairs, seconds, rate, cpu_rate, peak = (
            statistics.median(row[each] for row in same) for each in fields
        )
        line = f"{stage:14} {name:14} {pairs:11,.0f} {seconds:8.3g} {rate:11,.0f}"
        line += f" {cpu_rate:11,.0f} {peak:9.1f}"
        for further in ("step_ms", "difference"):
            if further in same[0]:
                line += f"  {further} {statistics.median(row[further] for row in same):.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__, prog="python -m benchmarks.pairs")
    parser.add_argument("--pairs", type=int, default=200_000, help="pairs to index and to split")
    parser.add_argument("--large", type=int, default=12_000_000, help="pairs of the large index")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=STAGES, help="measure these stages again")
    parser.add_argument("--output", type=Path, default=RESULTS / "pairs.csv")
    arguments = parser.parse_args()
    chosen = [stage for stage in STAGES if stage in (arguments.only or STAGES)]
    known = read_rows(arguments.output) if arguments.only else []
    rows = [row for row in known if row["stage"] not in chosen]
    order = list(STAGES)
    machine = {"version": code_version(), "device": device_name("cpu"), "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="fasterase-pairs-") as temporary:
        folders = [Path(temporary) / name for name in ("small", "pictures", "photos", "large")]
        for folder in folders:
            folder.mkdir()
        count = -(-arguments.pairs // SHARD_PAIRS)
        small = write_shards(folders[0], shards=count, pairs=SHARD_PAIRS, side=64)
        shards = {
            "small": small,
            "pictures": write_shards(folders[1], shards=2, pairs=_PICTURES // 2, side=256),
            "photos": write_shards(folders[2], shards=1, pairs=_PHOTOS, side=512),
            "large": write_large(folders[3], small[0], pairs=arguments.large),
        }
        for stage in chosen:
            for row in measure(stage, shards[STAGES[stage][0]], repeats=arguments.repeats):
                rows.append({**row, **machine})
                write_csv(arguments.output, sorted(rows, key=lambda r: order.index(r["stage"])))
    print(summarise(rows))


if __name__ == "__main__":
    exit_with(main)
