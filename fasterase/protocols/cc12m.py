"""Conceptual 12M as img2dataset's shards: pairs that name a concept; recall@k and zero-shot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import fasterase
from fasterase.errors import InputError
from fasterase.pairs.table import PairTable
from fasterase.protocols.protocol import Case, Measure, Protocol, Reported

CONCEPT = "apple"
# Every tenth pair is measured, and not trained on.
MEASURED = 10
# What zero-shot accuracy chooses from, besides the concept: things that many captions name.
CLASSES = ("dog", "cat", "car", "tree", "house", "flower", "beach", "dress", "cake", "chair")
MEASURES = (
    Measure("forget accuracy, %", "zero_shot", "forget test/accuracy@1"),
    Measure("retain accuracy, %", "zero_shot", "retain test/accuracy@1"),
    *(
        Measure(f"{name}, {title} R@{k}, %", "retrieval", f"{name} test/{key}@{k}")
        for name in ("forget", "retain")
        for key, title in (("image_to_text", "image->text"), ("text_to_image", "text->image"))
        for k in (1, 5, 10)
    ),
)
DATA = (
    "the shards `00000.tar`, `00001.tar`, ... (samples of jpg, txt and json) that img2dataset "
    "writes: img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col "
    "caption --output_format webdataset --output_folder DATA (the list, with these column names "
    "added: https://github.com/google-research-datasets/conceptual-12m)"
)


def cases(data: Path, concept: str | None) -> Iterator[Case]:
    """Yield the one case.

    Raises:
        InputError: there are no shards, or too few captions name the concept.
    """
    if not data.is_dir() or not any(data.glob("*.tar")):
        raise InputError(f"--data={str(data)!r} holds no shards. Put there {DATA}.")
    one = concept or CONCEPT
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
    cases,
    MEASURES,
    DATA,
    "Every tenth pair is held out and measured. Accuracies are over the concept and ten frequent "
    "things, on pairs whose caption names exactly one of them. The paper's figures are from "
    "third-party notes; its concepts and classes are not known to be these.",
)
