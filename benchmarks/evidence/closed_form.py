"""Methods without training: a linear map on the features, folded into both towers' projections."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.task import Method, Setting, Task
from fasterase.demo.sets import Drawings
from fasterase.errors import import_extra
from fasterase.models.dual_encoder import DualEncoder


def project_texts_out(task: Task, setting: Setting) -> None:
    """Project both towers' features onto the null space of the concept's text features.

    The `rank` leading right singular vectors of the forget captions' features, with the mean of the
    retain captions' subtracted first if `centred`, span what is removed.
    """
    texts = encode_captions(task.model, task.sets.forget)
    if setting["centred"]:
        texts = texts - encode_captions(task.model, task.sets.retain).mean(0)
    directions = torch.linalg.svd(texts, full_matrices=False).Vh[: setting["rank"]]
    removed = directions.T @ directions
    kept = torch.eye(len(removed), dtype=removed.dtype) - removed
    fold(task.model, kept, kept)
    task.measure(0)


def erase_linearly(task: Task, setting: Setting) -> None:
    """LEACE in each tower: no linear classifier finds the concept in the mapped features."""
    library = import_extra("concept_erasure", "dev", "the method LEACE")
    maps = []
    for encode in (encode_images, encode_captions):
        forget, retain = (encode(task.model, each) for each in (task.sets.forget, task.sets.retain))
        kinds = torch.zeros(len(forget) + len(retain), dtype=torch.long)
        kinds[: len(forget)] = 1
        if setting["labels"] == "concepts":
            names = task.sets.forget.names
            if encode is encode_captions:
                names = [n for i, n in enumerate(names) for _ in task.sets.forget[i]["text"]]
            known = sorted(set(names))
            kinds[: len(forget)] = torch.tensor([1 + known.index(name) for name in names])
        labels = torch.nn.functional.one_hot(kinds)[:, 1:].double()
        fitter = library.LeaceFitter.fit(torch.cat((forget, retain)), labels, affine=False)
        maps.append(fitter.eraser.P.T)
    fold(task.model, *maps)
    task.measure(0)


def encode_captions(model: DualEncoder, drawings: Drawings) -> Tensor:
    """Return text features of every caption of every drawing, [captions, D], in fp64."""
    texts = [drawings[index]["text"] for index in range(len(drawings))]
    captions = [[text] if isinstance(text, str) else text for text in texts]
    flat = [*chain.from_iterable(captions)]
    return _encode(flat, lambda part: model.encode_text(model.tokenize(part)))


def encode_images(model: DualEncoder, drawings: Drawings) -> Tensor:
    """Return image features, [drawings, D], in fp64."""
    pictures = [model.preprocess(drawings[index]["image"]) for index in range(len(drawings))]
    return _encode(pictures, lambda part: model.encode_image(torch.stack(part)))


@torch.no_grad()
def _encode(items: list[Any], encode: Callable[[list[Any]], Tensor]) -> Tensor:
    parts = [encode(items[start : start + 256]) for start in range(0, len(items), 256)]
    return torch.cat(parts).double()


def fold(model: DualEncoder, image_map: Tensor, text_map: Tensor) -> None:
    """Multiply the towers' projections, [width, D], by maps of their features, [D, D]."""
    module: Any = model.module
    with torch.no_grad():
        for weight, matrix in ((module.visual.proj, image_map), (module.text_projection, text_map)):
            weight.copy_((weight.double() @ matrix).to(weight.dtype))


PROJECTIONS = [{"rank": rank, "centred": each} for rank in (2, 8, 32) for each in (False, True)]
BY_SET, BY_CONCEPT, LEACE = {"labels": "set"}, {"labels": "concepts"}, "arXiv 2306.03819"
METHODS = (
    Method("null-space projection", "after arXiv 2512.14137", project_texts_out, PROJECTIONS),
    Method("LEACE", LEACE, erase_linearly, [BY_SET, BY_CONCEPT]),
    # Tuning may choose the other, which costs little and forgets little.
    Method("LEACE, a label per concept", LEACE, erase_linearly, [BY_CONCEPT], most_seeds=1),
)
