"""Flickr30K in the split of Karpathy: images whose captions name a concept; recall@k."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.protocols.protocol import RECALLS, Case, Protocol, Reported
from fasterase.errors import InputError

CONCEPT = "dog"
ANNOTATIONS, IMAGES = "dataset_flickr30k.json", "flickr30k-images"
DATA = (
    f"`{ANNOTATIONS}` (in Karpathy's caption_datasets.zip, "
    "https://cs.stanford.edu/people/karpathy/deepimagesent/) and the folder "
    f"`{IMAGES}` with its jpg files (on request, https://shannon.cs.illinois.edu/DenotationGraph/)"
)


def cases(data: Path, concept: str | None) -> Iterator[Case]:
    """Yield the one case: the concept is erased from `train` and measured on `test`.

    Raises:
        InputError: the data is missing or has another form, or too few images name the concept.
    """
    annotations = data / ANNOTATIONS
    if not annotations.is_file() or not (data / IMAGES).is_dir():
        raise InputError(f"--data={str(data)!r} holds no Flickr30K. Put there {DATA}.")
    one = concept or CONCEPT
    names = re.compile(rf"\b{re.escape(one)}s?\b", re.IGNORECASE)
    sets: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    try:
        for image in json.loads(annotations.read_text(encoding="utf-8"))["images"]:
            captions = [sentence["raw"] for sentence in image["sentences"]]
            named = any(map(names.search, captions))
            path = str(data / IMAGES / image["filename"])
            sets.setdefault((image["split"], named), []).append({"image": path, "text": captions})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{annotations} is not in Karpathy's form ({error!r}). It should be {DATA}."
        ) from error
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
    cases,
    RECALLS,
    DATA,
    "Candidates are the images and all captions of each test set by itself. The paper's figures "
    "are from third-party notes: R@10 on forget and retain, whose direction and concept are not "
    "known to be these.",
)
