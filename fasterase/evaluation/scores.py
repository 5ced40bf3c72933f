"""From features to one value a pair and metric, for all sets at once.

Candidate pools:
- image->text: the distinct first captions of all sets together: numbers compare across sets.
- text->image for a set: its own images and the retain set's as distractors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasterase.evaluation.features import SetFeatures
from fasterase.evaluation.metrics import CONCEPT_DEPTHS, RECALL_DEPTHS
from fasterase.evaluation.ranking import Position, chance, joined, position, similarity_chunks


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
