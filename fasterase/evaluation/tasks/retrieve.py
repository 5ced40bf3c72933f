"""Retrieval within each set: captions of images, images of captions, and images of images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.evaluation.features import captions_of
from fasterase.evaluation.figures import Figure, Found
from fasterase.evaluation.scores import chance_position, search_candidates
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
    figures: list[Figure] = []
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
            figures += target.hit_figures(
                name,
                search_candidates(queries, candidates, right),
                _chances(right, len(candidates), [k for k in DEPTHS if k < len(candidates)]),
                key=key,
                title=f"{title} R@{{}}, %",
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
    figures: list[Figure] = []
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
        figures += target.hit_figures(
            name,
            search_candidates(own[queries], gallery, wanted, without=queries),
            _chances(wanted, len(gallery) - 1, DEPTHS[:2]),
            key="recall",
            title="image->image R@{}, %",
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


def _chances(
    right: Sequence[list[int]], candidates: int, depths: Sequence[int]
) -> dict[int, float]:
    """Return depth -> recall in a random order of the candidates, over queries `right` [n]."""
    position = chance_position(candidates, np.array([len(those) for those in right]))
    return {k: float(position.hit(k).mean()) for k in depths}
