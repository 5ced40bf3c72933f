"""Retrieval within each set: captions of images, images of captions, and images of images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.evaluation.features import captions_of
from fasterase.evaluation.figures import Found
from fasterase.evaluation.scores import (
    Position,
    chance_position,
    column_mask,
    find_position,
    join_positions,
    similarity_chunks,
)
from fasterase.evaluation.target import Target
from fasterase.evaluation.tasks.classify import image_labels

DEPTHS = (1, 5, 10)


def retrieval(target: Target) -> Found:
    """Return recall@1/5/10 of each set by itself, image->text and text->image.

    The usual protocol of Flickr30K and COCO: the candidates are the set's own images and all their
    captions; any of an image's captions is right, and each caption is a query. (The metrics of the
    evaluation rank first captions among those of all sets instead.) Costs all captions through the
    text tower.
    """
    figures = []
    for name in target.evaluator.sources:
        features = target.features[name]
        captions, text = encode_captions(target, name)
        place: dict[str, int] = {}
        for caption in chain.from_iterable(captions):
            place.setdefault(caption, len(place))
        own = [sorted({place[caption] for caption in those}) for those in captions]
        images_of: list[list[int]] = [[] for _ in place]
        for row, those in enumerate(own):
            for column in those:
                images_of[column].append(row)
        for key, title, queries, candidates, right in (
            ("image_to_text", "image->text", features.image, text, own),
            ("text_to_image", "text->image", text, features.image, images_of),
        ):
            position = _positions(queries, candidates, right)
            expected = chance_position(len(candidates), np.array([len(r) for r in right]))
            for k in DEPTHS:
                if k < len(candidates):
                    figures.append(
                        target.mean_figure(
                            name,
                            position.hit(k),
                            key=f"{key}@{k}",
                            title=f"{title} R@{k}, %",
                            chance=float(expected.hit(k).mean()),
                        )
                    )
    if not figures:
        raise InputError("tasks: 'retrieval' needs a set of two pairs or more.")
    return Found(figures)


def image_retrieval(target: Target) -> Found:
    """Return how often the images nearest to an image show the same thing.

    An image queries the other images of its set and those of the retain set. Right are those with
    its class, or else with its first caption; images without any such other do not count. Recall@1
    is the share of queries whose nearest image is right. Costs no pass through a model.

    Raises:
        InputError: no image has another one of its class or caption.
    """
    labels = image_labels(target)
    figures = []
    for name in labels:
        own, label = target.features[name].image, labels[name]
        gallery, gallery_label = own, label
        if name != "retain":
            gallery = torch.cat([own, target.features["retain"].image])
            gallery_label = np.concatenate([label, labels["retain"]])
        columns: dict[int, list[int]] = {}
        for column, each in enumerate(gallery_label.tolist()):
            columns.setdefault(each, []).append(column)
        right = [[c for c in columns[each] if c != row] for row, each in enumerate(label.tolist())]
        queries = [row for row, those in enumerate(right) if those]
        if not queries:
            continue
        wanted = [right[row] for row in queries]
        position = _positions(own[queries], gallery, wanted, without=queries)
        expected = chance_position(len(gallery) - 1, np.array([len(those) for those in wanted]))
        for k in DEPTHS[:2]:
            figures.append(
                target.mean_figure(
                    name,
                    position.hit(k),
                    key=f"recall@{k}",
                    title=f"image->image R@{k}, %",
                    chance=float(expected.hit(k).mean()),
                )
            )
    if not figures:
        raise InputError(
            "tasks: 'image_retrieval' needs images with another one of their class or caption, and "
            "there are none. Give class_names=, or leave 'image_retrieval' out."
        )
    return Found(figures)


def encode_captions(target: Target, name: str) -> tuple[list[list[str]], Tensor]:
    """Return all captions of each pair of a set [n], and a feature of each distinct one [m, D]."""
    features, source = target.features[name], target.evaluator.sources[name]
    captions = [captions_of(source, row) for row in features.rows.tolist()]
    distinct = list(dict.fromkeys(chain.from_iterable(captions)))
    place = {caption: i for i, caption in enumerate(features.captions)}
    fresh = [caption for caption in distinct if caption not in place]
    text = features.text
    if fresh:
        place |= {caption: len(text) + i for i, caption in enumerate(fresh)}
        text = torch.cat([text, target.encoder.texts(fresh)])
    return captions, text[[place[caption] for caption in distinct]]


def _positions(
    queries: Tensor,  # [n, D]
    candidates: Tensor,  # [m, D]
    right: Sequence[list[int]],  # [n] candidates that are right
    without: Sequence[int] | None = None,  # [n] a candidate that is none: the query itself
) -> Position:
    parts = []
    for rows, similarity in similarity_chunks(queries, candidates):
        if without is not None:
            similarity[torch.arange(len(similarity)), list(without[rows])] = -torch.inf
        parts.append(find_position(similarity, column_mask(right[rows], len(candidates))))
    return join_positions(parts)
