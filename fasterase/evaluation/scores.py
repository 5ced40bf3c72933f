"""From features to one value a pair and metric, for all sets at once.

Candidate pools:
- image->text: the distinct first captions of all sets together: numbers compare across sets.
- text->image for a set: its own images and the retain set's as distractors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.errors import InputError
from fasterase.evaluation.features import SetFeatures
from fasterase.evaluation.metrics import CONCEPT_DEPTHS, RECALL_DEPTHS


@dataclass(frozen=True)
class SetScores:
    """Per-pair values of one set.

    Attributes:
        ids: [n] ids of the pairs.
        values: metric key -> [n]; NaN where a pair has no such value (no known class).
        chance: metric key -> the value of a random order of the candidates; for the cosine the
            mean over unmatched candidates.
    """

    ids: list[str]
    values: dict[str, np.ndarray]
    chance: dict[str, float]


@dataclass(frozen=True)
class CaptionPool:
    """Distinct captions of all sets, the candidates of image->text."""

    text: Tensor  # [M, D]
    captions: list[str]  # [M]
    row: dict[str, int]  # caption -> its row

    @classmethod
    def of(cls, sets: Mapping[str, SetFeatures]) -> CaptionPool:
        captions: list[str] = []
        row: dict[str, int] = {}
        rows: list[Tensor] = []
        for features in sets.values():
            for caption, vector in zip(features.captions, features.text, strict=True):
                if caption not in row:
                    row[caption] = len(captions)
                    captions.append(caption)
                    rows.append(vector)
        return cls(torch.stack(rows), captions, row)


def retrieval_scores(
    features: SetFeatures,
    pool: CaptionPool,
    concept: Tensor,  # [M] bool, which captions of the pool belong to the erased concept
    distractors: SetFeatures | None,
) -> SetScores:
    """All retrieval metrics of one set; memory is bounded by `ranking.CHUNK_ELEMENTS`."""
    n, size = len(features.ids), len(pool.captions)
    own = [[pool.row[c] for c in texts if c in pool.row] for texts in features.pair_captions]
    first = torch.tensor([pool.row[features.captions[i]] for i in features.pair_text])
    own_count = np.array([len(rows) for rows in own])

    own_parts, first_parts, concept_parts, matched, unmatched = [], [], [], [], []
    for rows, similarity in similarity_chunks(features.image, pool.text):
        right = _mask(own[rows], size)
        own_parts.append(position(similarity, right))
        canonical = torch.zeros_like(right).scatter_(1, first[rows, None], True)
        first_parts.append(position(similarity, canonical))
        concept_parts.append(position(similarity, concept[None]))
        matched.append(similarity[canonical].double().numpy())
        wrong = similarity.masked_fill(right, 0).sum(dim=1).double().numpy()
        unmatched.append(wrong / np.maximum(size - own_count[rows], 1))

    image_side, text_side, images = _text_to_image(features, distractors)
    concept_count = np.full(n, int(concept.sum()))
    values, expected = {}, {}
    for key, depths, found, by_chance in (
        ("image_to_text_recall", RECALL_DEPTHS, joined(own_parts), chance(size, own_count)),
        ("text_to_image_recall", RECALL_DEPTHS, image_side, chance(images, text_side)),
        ("concept_hit", CONCEPT_DEPTHS, joined(concept_parts), chance(size, concept_count)),
    ):
        for k in depths:
            values[f"{key}@{k}"] = found.hit(k)
            expected[f"{key}@{k}"] = float(by_chance.hit(k).mean())
    values["median_rank"] = joined(first_parts).rank()
    expected["median_rank"] = (size + 1) / 2
    values["matched_cosine"] = np.concatenate(matched)
    expected["matched_cosine"] = float(np.concatenate(unmatched).mean())
    return SetScores(features.ids, values, expected)


def _text_to_image(
    features: SetFeatures, distractors: SetFeatures | None
) -> tuple[Position, np.ndarray, int]:
    """Positions [n], right images of each pair's caption [n], and the number of candidates."""
    image, pair_captions = features.image, features.pair_captions
    if distractors is not None:
        image = torch.cat([image, distractors.image])
        pair_captions = pair_captions + distractors.pair_captions
    images_of: dict[str, list[int]] = {caption: [] for caption in features.captions}
    for row, captions in enumerate(pair_captions):
        for caption in captions:
            if caption in images_of:
                images_of[caption].append(row)
    right = [images_of[caption] for caption in features.captions]
    parts = [
        position(similarity, _mask(right[rows], len(image)))
        for rows, similarity in similarity_chunks(features.text, image)
    ]
    # Every pair asks with its first caption: a caption counts as often as it has pairs.
    found = Position(*(field[features.pair_text] for field in joined(parts)))
    counts = np.array([len(rows) for rows in right])
    return found, counts[features.pair_text], len(image)


def _mask(columns: list[list[int]], width: int) -> Tensor:
    """[len(columns), width] bool, True at each row's columns."""
    mask = torch.zeros(len(columns), width, dtype=torch.bool)
    rows = [row for row, those in enumerate(columns) for _ in those]
    mask[rows, [column for those in columns for column in those]] = True
    return mask


# Two cosines this close are a tie: fp32 dot products of equal unit vectors differ by about 1e-7.
TIE = 1e-6
# Elements of a similarity chunk; with its masks about 20 bytes each, so 80 MB.
CHUNK_ELEMENTS = 4_000_000


class Position(NamedTuple):
    """The best right candidate of each query among all candidates."""

    above: np.ndarray  # [n] candidates that stand before it, all of them wrong
    tied: np.ndarray  # [n] candidates that tie with it, itself included
    right: np.ndarray  # [n] right ones among the tied

    def hit(self, k: int) -> np.ndarray:
        """[n] probability that a right candidate is among the first `k`, ties in random order.

        `1 - C(tied - right, d) / C(tied, d)` with `d = k - above` draws from the tied ones.
        """
        miss = np.ones(len(self.above))
        for draw in range(k):
            drawn = (draw < k - self.above) & (draw < self.tied)
            wrong_left = np.maximum(self.tied - self.right - draw, 0)
            left = np.maximum(self.tied - draw, 1)
            miss = np.where(drawn, miss * wrong_left / left, miss)
        return 1.0 - miss

    def rank(self) -> np.ndarray:
        """[n] rank counted from 1, the mean over the tied places."""
        return 1.0 + self.above + (self.tied - 1) / 2


def position(similarity: Tensor, right: Tensor) -> Position:
    """Position of each row's best right candidate.

    Args:
        similarity: [n, m] cosines of queries with candidates.
        right: [n, m] or [1, m] bool, at least one True in each row.
    """
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    above = similarity > best + TIE
    tied = (similarity >= best - TIE) & ~above
    return Position(_count(above), _count(tied), _count(tied & right))


def _count(mask: Tensor) -> np.ndarray:
    """True values of each row. Summing bytes is ten times faster than summing bool on a CPU."""
    return mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).numpy()


def chance(candidates: int, right: np.ndarray) -> Position:
    """The position under a random order: all `candidates` tied, `right` [n] of them right."""
    return Position(np.zeros(len(right)), np.full(len(right), candidates), right)


def joined(parts: list[Position]) -> Position:
    """Positions of consecutive chunks of queries, as one."""
    return Position(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def similarity_chunks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`queries @ candidates.T` in slices of rows, at most `CHUNK_ELEMENTS` elements at a time."""
    step = max(1, CHUNK_ELEMENTS // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, queries[rows] @ candidates.T


TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)


class ClassLabels:
    """Finds the class of a pair.

    It is the class its source carries (`meta["class"]`, as class-per-folder sources do) or else the
    one class that a caption of it names as whole words; a caption that names several names none.
    "hot dog" is not "dog": the longer of overlapping names counts.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._index = {name.casefold(): i for i, name in enumerate(class_names)}
        longest_first = sorted(map(re.escape, self._index), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def of(self, meta: Mapping[str, Any], captions: Sequence[str]) -> int | None:
        """Index of the pair's class, or None."""
        known = self._index.get(str(meta.get("class", "")).casefold())
        if known is not None:
            return known
        for caption in captions:
            named = set(self._pattern.findall(caption.casefold()))
            if len(named) == 1:
                return self._index[named.pop()]
        return None


def class_vectors(
    encode: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """[C, D] unit mean of each class's prompt features; `encode` maps texts to unit rows."""
    prompts = [template.format(name) for name in class_names for template in templates]
    rows = encode(prompts).view(len(class_names), len(templates), -1)
    return normalize(rows.mean(dim=1), dim=-1)


def accuracy(image: Tensor, classes: Tensor, labels: Sequence[int | None]) -> np.ndarray:
    """[n] 1 where the nearest of `classes` [C, D] is the label, else 0; NaN without a label."""
    index = torch.tensor([-1 if label is None else label for label in labels])
    parts = []
    for rows, similarity in similarity_chunks(image, classes):
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right.scatter_(1, index[rows, None].clamp(min=0), True)
        parts.append(position(similarity, right))
    return np.where(index.numpy() < 0, np.nan, joined(parts).hit(1))


def checked_templates(templates: Sequence[str] | None) -> tuple[str, ...]:
    """`templates`, by default `TEMPLATES`.

    Raises:
        InputError: one is not text with one `{}` for the class name.
    """
    if templates is None:
        return TEMPLATES
    if isinstance(templates, str):
        templates = (templates,)
    if not isinstance(templates, list | tuple):
        raise InputError(f"templates={templates!r} must be a list of texts.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(
                f"templates: {template!r} must be text with one {{}} for the class name, "
                f"such as {TEMPLATES[0]!r}."
            )
    if not templates:
        raise InputError("templates is empty. Leave it out for the default, or give one or more.")
    return tuple(templates)


def checked_class_names(class_names: Sequence[str] | None) -> list[str] | None:
    """`class_names` without repetitions.

    Raises:
        InputError: it is a single text, holds something else than text, or fewer than two names.
    """
    if class_names is None:
        return None
    listed = isinstance(class_names, list | tuple)
    if not listed or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"class_names={class_names!r} must be a list of names, one a class.")
    first_spelling: dict[str, str] = {}
    for name in filter(str.strip, class_names):
        first_spelling.setdefault(name.casefold(), name)
    names = list(first_spelling.values())
    if len(names) < 2:
        raise InputError(
            f"class_names has {len(names)} distinct names; accuracy needs two or more. "
            "List all classes to choose from, kept ones too."
        )
    return names
