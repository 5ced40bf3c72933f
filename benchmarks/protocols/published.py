"""The published data sets: CIFAR-100, Flickr30K in the split of Karpathy, and Conceptual 12M.

Of CIFAR-100 one class, several, and a part of a class's pictures are erased, and zero-shot accuracy
is measured; of the others what captions name, and recall@k (of Conceptual 12M also accuracy).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fasterase
from benchmarks.protocols.protocol import ACCURACIES, RECALLS, Case, Protocol, Reported
from fasterase.errors import InputError
from fasterase.pairs.table import PairTable

CLASS = "apple"
SEVERAL = ("apple", "mushroom", "orange", "pear", "sweet pepper")
# Shares of the class's training pictures that the eraser is given.
RATIOS = (0.5, 0.1)
CIFAR_DATA = (
    "the folder `cifar-100-python` (`train`, `test`, `meta`), which torchvision downloads: python "
    "-c \"import torchvision; torchvision.datasets.CIFAR100('DATA', download=True)\""
)


def cifar_cases(data: Path, concept: str | None) -> Iterator[Case]:
    """Yield the cases: test pictures are never trained on."""
    from torchvision.datasets import CIFAR100

    try:
        train, test = (CIFAR100(str(data), train=each, download=False) for each in (True, False))
    except RuntimeError as error:
        raise InputError(
            f"--data={str(data)!r} holds no CIFAR-100. Put there {CIFAR_DATA}."
        ) from error
    names = [name.replace("_", " ") for name in train.classes]
    if concept is not None and concept not in names:
        raise InputError(f"--concept {concept!r} is no class of CIFAR-100: {', '.join(names)}.")
    one = concept or CLASS
    chosen: dict[str, tuple[tuple[str, ...], float]] = {one: ((one,), 1.0)}
    if concept is None:
        chosen["fruit and vegetables"] = (SEVERAL, 1.0)
        chosen |= {f"{one}, {ratio:.0%} of the pictures": ((one,), ratio) for ratio in RATIOS}
    for name, (classes, ratio) in chosen.items():
        forget, retain = fasterase.split(train, forget=list(classes))
        forget_test, retain_test = fasterase.split(test, forget=list(classes))
        yield Case(
            name.replace("%", " percent"),
            forget[: max(1, round(ratio * len(forget)))],
            retain,
            forget_sets={"forget test": forget_test},
            sets={"retain test": retain_test},
            class_names=names,
            reported={
                "forget accuracy, %": Reported(86.08, 0.00),
                "retain accuracy, %": Reported(72.85, 90.99),
            }
            if name == CLASS
            else {},
        )


CIFAR = Protocol(
    cifar_cases,
    ACCURACIES,
    CIFAR_DATA,
    "Accuracies are over the names of all 100 classes, on test pictures. The paper's figures are "
    "from third-party notes, for one class with the paper's own choice of CLIP; its class and "
    "prompts are not known to be these.",
)


class KarpathyFiles(NamedTuple):
    """A data set of pictures with five captions each, in Karpathy's splits."""

    name: str
    annotations: str  # file
    images: str  # folder
    source: str  # where the pictures are from

    @property
    def data(self) -> str:
        return (
            f"`{self.annotations}` (in Karpathy's caption_datasets.zip, "
            "https://cs.stanford.edu/people/karpathy/deepimagesent/) and the folder "
            f"`{self.images}` with its jpg files ({self.source})"
        )


def read_karpathy(
    folder: Path, files: KarpathyFiles, *, argument: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the split and the pair, with all its captions, of each picture of its image folder.

    Raises:
        InputError: the files are missing, or in another form.
    """
    annotations, images = folder / files.annotations, folder / files.images
    if not annotations.is_file() or not images.is_dir():
        raise InputError(
            f"--{argument}={str(folder)!r} holds no {files.name}. Put there {files.data}."
        )
    try:
        for each in json.loads(annotations.read_text(encoding="utf-8"))["images"]:
            captions = [sentence["raw"] for sentence in each["sentences"]]
            # Of COCO, some are in another folder, none of them for testing.
            if each.get("filepath", files.images) == files.images:
                path = str(images / each["filename"])
                yield each["split"], {"image": path, "text": captions}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{annotations} is not in Karpathy's form ({error!r}). It should be {files.data}."
        ) from error


FLICKR_CONCEPT = "dog"
FLICKR_FILES = KarpathyFiles(
    "Flickr30K",
    "dataset_flickr30k.json",
    "flickr30k-images",
    "on request, https://shannon.cs.illinois.edu/DenotationGraph/",
)
COCO_FILES = KarpathyFiles("COCO", "dataset_coco.json", "val2014", "https://cocodataset.org")


def flickr_cases(data: Path, concept: str | None) -> Iterator[Case]:
    """Yield the one case: the concept is erased from `train` and measured on `test`."""
    one = concept or FLICKR_CONCEPT
    names = re.compile(rf"\b{re.escape(one)}s?\b", re.IGNORECASE)
    sets: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for split, pair in read_karpathy(data, FLICKR_FILES, argument="data"):
        named = any(map(names.search, pair["text"]))
        sets.setdefault((split, named), []).append(pair)
    for split in ("train", "test"):
        for named, wanted in ((True, "name"), (False, "do not name")):
            if (split, named) not in sets:
                raise InputError(
                    f"--concept {one!r}: no images of the {split} split {wanted} it. Give another."
                )
    yield Case(
        one,
        sets["train", True],
        sets["train", False],
        forget_sets={"forget test": sets["test", True]},
        sets={"retain test": sets["test", False]},
        reported={
            "forget, text->image R@10, %": Reported(None, 10.55),
            "retain, text->image R@10, %": Reported(None, 50.35),
        },
    )


FLICKR = Protocol(
    flickr_cases,
    RECALLS,
    FLICKR_FILES.data,
    "Candidates are the images and all captions of each test set by itself. The paper's figures "
    "are from third-party notes: R@10 on forget and retain, whose direction and concept are not "
    "known to be these.",
)

CC12M_CONCEPT = "apple"
# Every tenth pair is measured, and not trained on.
MEASURED = 10
# What zero-shot accuracy chooses from, besides the concept: things that many captions name.
CLASSES = ("dog", "cat", "car", "tree", "house", "flower", "beach", "dress", "cake", "chair")
CC12M_DATA = (
    "the shards `00000.tar`, `00001.tar`, ... (samples of jpg, txt and json) that img2dataset "
    "writes: img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col "
    "caption --output_format webdataset --output_folder DATA (the list, with these column names "
    "added: https://github.com/google-research-datasets/conceptual-12m)"
)


def cc12m_cases(data: Path, concept: str | None) -> Iterator[Case]:
    """Yield the one case."""
    if not data.is_dir() or not any(data.glob("*.tar")):
        raise InputError(f"--data={str(data)!r} holds no shards. Put there {CC12M_DATA}.")
    one = concept or CC12M_CONCEPT
    pattern = re.compile(rf"\b{re.escape(one)}s?\b", re.IGNORECASE)
    forget, retain = fasterase.split(str(data), forget=pattern)
    if min(len(forget), len(retain)) < MEASURED:
        raise InputError(
            f"--concept {one!r}: {len(forget)} captions name it and {len(retain)} do not; "
            f"{MEASURED} of each are needed. Give another concept, or more shards."
        )

    def part(pairs: PairTable, *, measured: bool) -> PairTable:
        chosen = (np.arange(len(pairs)) % MEASURED == 0) == measured
        return pairs.where(chosen)

    yield Case(
        one,
        part(forget, measured=False),
        part(retain, measured=False),
        forget_sets={"forget test": part(forget, measured=True)},
        sets={"retain test": part(retain, measured=True)},
        class_names=[one, *(name for name in CLASSES if name != one)],
        reported={
            "forget accuracy, %": Reported(None, 0.74),
            "retain accuracy, %": Reported(None, 97.10),
        },
    )


CC12M = Protocol(
    cc12m_cases,
    (*ACCURACIES, *RECALLS),
    CC12M_DATA,
    "Every tenth pair is held out and measured. Accuracies are over the concept and ten frequent "
    "things, on pairs whose caption names exactly one of them. The paper's figures are from "
    "third-party notes; its concepts and classes are not known to be these.",
)
