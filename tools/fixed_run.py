"""Do small erasures still give the same weights, bit for bit? For changes of structure.

    python -m tools.fixed_run --save runs/fixed.json    # before the change
    python -m tools.fixed_run --check runs/fixed.json   # after it, on the same machine

Each run erases from a small random-weight model; together they read every kind of pair source,
and take the automatic recipe, micro-batches, the prefix cache, LoRA and 8 wordings of a caption.
Weights and losses depend on the CPU, so the file is not for another machine.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import fasterase
from benchmarks.command import new_parser
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config
from fasterase.demo.sets import build_sets
from fasterase.files import write_text
from tests.small_models import (
    hf_clip,
    hf_tokenizer,
    open_clip_resnet,
    open_clip_vit,
    simple_tokenizer,
)

NAMES = ("apple", "house", "river", "cloud", "tiger", "chair", "bread", "stone")
STEPS = {"lr": 1e-3, "max_steps": 4, "batch_size": 12, "forget_batch_size": 4, "progress": False}


def _items(names: Sequence[str], count: int) -> list[tuple[Image.Image, list[str]]]:
    numbers = np.random.default_rng(len(names))
    return [
        (
            Image.fromarray(numbers.integers(0, 256, (40, 36, 3), dtype=np.uint8)),
            [f"{wording} {name} {i % 3}" for wording in ("a photo of a", "one", "the")],
        )
        for i in range(count)
        for name in names
    ]


def _write_sources(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Write the same pairs in several forms; return form -> forget and retain."""
    sets = {"forget": _items(NAMES[:2], 6), "retain": _items(NAMES[2:], 8)}
    for name, items in sets.items():
        captioned, classes = folder / name / "captioned", folder / name / "classes"
        captioned.mkdir(parents=True)
        rows = []
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i, (image, captions) in enumerate(items):
                png = io.BytesIO()
                image.save(png, "png")
                (captioned / f"{i:03}.png").write_bytes(png.getvalue())
                (captioned / f"{i:03}.txt").write_text(captions[0])
                own = classes / captions[0].split()[-2]
                own.mkdir(parents=True, exist_ok=True)
                (own / f"{i:03}.png").write_bytes(png.getvalue())
                rows.append((f"{name}/captioned/{i:03}.png", captions[0]))
                for ending, data in (("png", png.getvalue()), ("txt", captions[0].encode())):
                    member = tarfile.TarInfo(f"{i:03}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), *rows])
        lines = (json.dumps({"image": path, "caption": title}) for path, title in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    patterns = {"csv": "{}.csv", "jsonl": "{}.jsonl", "tar": "{}.tar"}
    patterns |= {"captioned": "{}/captioned", "classes": "{}/classes"}
    found: dict[str, tuple[Any, Any]] = {
        form: (str(folder / pattern.format("forget")), str(folder / pattern.format("retain")))
        for form, pattern in patterns.items()
    }
    return {**found, "objects": (sets["forget"], sets["retain"])}


def _vit() -> nn.Module:
    return open_clip_vit(layers=3)


def _erasures(folder: Path) -> Iterator[tuple[str, Callable[[], fasterase.UnlearnResult]]]:
    sources = _write_sources(folder)

    def run(form: str, build: Callable[[], nn.Module] = _vit, **fields: Any) -> Any:
        forget, retain = sources[form]
        given: dict[str, Any] = {"tokenizer": simple_tokenizer()}
        if build is hf_clip:
            given = {"tokenizer": hf_tokenizer(), "preprocess": _preprocess}
        return lambda: fasterase.unlearn(build(), forget, retain, **given, **{**STEPS, **fields})

    for form in sources:
        yield form, run(form)
    yield "micro-batches, workers", run("csv", micro_batch_size=5, num_workers=2)
    yield "prefix cache", run("tar", tune="last:1", prefix_cache=1.0)
    yield "LoRA", run("objects", tune="lora:2")
    yield "resnet", run("objects", open_clip_resnet, train_mode=True, weight_decay=0.1)
    yield "transformers", run("objects", hf_clip)
    yield "paper", run("csv", floor=None, anchor_weight=0.0, negatives="joint")
    yield "line", run("csv", lr="auto")
    sets = build_sets("food-fruit", original=str(emoji.BASE_MODEL), seed=0)
    config = recipe_config("fasterase", small_model=True, progress=False, max_steps=None)
    yield (
        "automatic",
        lambda: fasterase.unlearn(str(emoji.BASE_MODEL), sets.forget, sets.retain, config=config),
    )


def _preprocess(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image.convert("RGB").resize((32, 32)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def digests() -> dict[str, str]:
    """Return run -> digest of its weights, losses and residues."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, erase in _erasures(Path(folder)):
            result = erase()
            digest = hashlib.sha256()
            for key, weight in sorted(result.model.state_dict().items()):
                digest.update(key.encode() + weight.contiguous().numpy().tobytes())
            losses = [(r.total, r.forget, r.retain, r.lr) for r in result.history]
            digest.update(repr((losses, result.verdict, result.residue)).encode())
            found[name] = digest.hexdigest()[:16]
            print(f"{name}: {found[name]}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the digests, or compare them with saved ones; return 1 where one differs."""
    parser = new_parser(__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--save", type=Path)
    action.add_argument("--check", type=Path)
    options = parser.parse_args(arguments)
    found = digests()
    if options.save is not None:
        write_text(options.save, json.dumps(found, indent=1) + "\n")
        return 0
    expected = json.loads(options.check.read_text(encoding="utf-8"))
    differing = [name for name in expected if found.get(name) != expected[name]]
    print("different: " + ", ".join(differing) if differing else "all are the same")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
