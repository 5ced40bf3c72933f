"""Tasks: classify and retrieve the pairs of every set; rank other wordings of their captions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.findings import Examined, Finding, Target
from fasterase.evaluation.metrics import DIRECTIONS, RECALL_DEPTHS
from fasterase.evaluation.scores import (
    Position,
    captions_of,
    distinct_firsts,
    first_copies,
    image_labels,
    search_candidates,
    search_images,
    share_below,
)
from fasterase.evaluation.zero_shot import encode_classes, label_pairs
from fasterase.pairs.table import PairTable

ACCURACY_DEPTHS = (1, 5)
FOLDS = 2

# Features [n, D] and class numbers [n] to learn from -> class numbers of features [m, D].
Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def zero_shot(target: Target) -> Examined:
    """Return each set's zero-shot accuracy, top 1 and top 5, over `class_names`.

    A class is the unit mean of its prompts; pairs with a known class count (`label_pairs`).

    Raises:
        InputError: no classes are known, or no pair has one.
    """
    evaluator = target.evaluator
    names = evaluator.class_names
    if not names:
        raise InputError(
            "tasks: 'zero_shot' needs classes. Give class_names=, or sets whose folders are "
            "classes, or leave 'zero_shot' out."
        )
    labels = label_pairs(names, evaluator.sources, target.features)
    if not labels:
        raise InputError("tasks: 'zero_shot': no pair belongs to one of class_names.")
    classes = encode_classes(target.encoder.texts, names, evaluator.templates)
    depths = [k for k in ACCURACY_DEPTHS if k < len(names)]
    findings: list[Finding] = []
    for name, those in labels.items():
        rows = those >= 0
        images, right = target.features[name].image[torch.from_numpy(rows)], those[rows, None]
        found = search_candidates(images, classes, right.tolist())
        hits = {k: (found.hit(k), k / len(names)) for k in depths}
        title = "zero-shot accuracy, top {}, %"
        findings += target.hits(name, hits, key="accuracy", title=title)
    return Examined(findings)


def labels_of(target: Target) -> dict[str, np.ndarray]:
    """Return set -> [n] number of each pair's class, or else of its first caption."""
    sources = target.evaluator.sources
    classes = label_pairs(target.evaluator.class_names, sources, target.features)
    return image_labels({name: target.features[name] for name in sources}, classes)


def probe(target: Target, fit: Fit, *, task: str, title: str) -> Examined:
    """Fit a classifier on half of the images of each label, and score the others; then swap.

    A label is the pair's class, or else its first caption. All sets are fitted together: labels
    with images in both halves, of whatever set, take part; copies of an image are in one half.

    Raises:
        InputError: fewer than two labels have two images.
    """
    labels = labels_of(target)
    joined = np.concatenate([*labels.values()])
    features = torch.cat([target.features[name].image for name in labels])
    images = features.double().numpy()
    # An image falls into the fold that has fewest of its label, a copy into that of the first one.
    sizes = np.zeros((joined.max() + 1, FOLDS), np.int64)
    fold = np.zeros(len(joined), np.int64)
    for place, (label, first) in enumerate(zip(joined, first_copies(features), strict=True)):
        fold[place] = fold[first] if first < place else sizes[label].argmin()
        sizes[label, fold[place]] += 1
    in_all = np.logical_and.reduce(sizes > 0, axis=1)
    taking_part, classes = in_all[joined], int(in_all.sum())
    if classes < 2:
        raise InputError(
            f"tasks: {task!r} needs two classes with two different images or more, found "
            f"{classes}. Give class_names= or sets with several images per caption, or leave "
            f"{task!r} out."
        )
    right = np.full(len(joined), np.nan)
    for held_out in range(FOLDS):
        train = taking_part & (fold != held_out)
        test = taking_part & (fold == held_out)
        right[test] = fit(images[train], joined[train])(images[test]) == joined[test]
    parts = np.split(right, np.cumsum([len(those) for those in labels.values()])[:-1])
    return Examined(
        [
            target.of_set(name, values, key="accuracy", title=title, chance=1 / classes)
            for name, values in zip(labels, parts, strict=True)
            if not np.isnan(values).all()
        ]
    )


def fit_linear(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    with warnings.catch_warnings():
        # Two images per caption are two per class: half of them are one each.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return fit_logistic(images, labels, tol=1e-3).predict


def fit_logistic(images: np.ndarray, labels: np.ndarray, **options: Any) -> Any:
    """Fit a logistic regression (L2, C = 1) of scikit-learn on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, **options))
    return model.fit(images, labels)


def fit_prototypes(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Assign images to the label with the nearest mean, by cosine."""
    known, place = np.unique(labels, return_inverse=True)
    means = np.zeros((len(known), images.shape[1]))
    np.add.at(means, place, images)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return lambda those: known[(those @ means.T).argmax(1)]


linear_probe = partial(probe, fit=fit_linear, task="linear_probe", title="linear probe accuracy, %")
prototypes = partial(probe, fit=fit_prototypes, task="prototypes", title="prototype accuracy, %")


def retrieval(target: Target) -> Examined:
    """Return recall@1/5/10 of each set by itself, image->text and text->image.

    The protocol of Flickr30K and COCO: the candidates are the set's own images and all their
    captions; any of an image's captions is right, and each caption is a query. (The metrics of the
    evaluation rank first captions among those of all sets instead.)
    """
    findings: list[Finding] = []
    for name in target.evaluator.sources:
        features, source = target.features[name], target.evaluator.sources[name]
        captions, place, text = encode_captions(target.encoder, source, features)
        for key, _, found in rank_captions(features.image, captions, place, text):
            hits = {k: found.at(k) for k in RECALL_DEPTHS if k < found.candidates[0]}
            findings += target.hits(name, hits, key=key, title=f"{DIRECTIONS[key]} R@{{}}, %")
    if not findings:
        raise InputError("tasks: 'retrieval' needs a set of two pairs or more.")
    return Examined(findings)


def rank_captions(
    image: Tensor, captions: Sequence[Sequence[str]], place: Mapping[str, int], text: Tensor
) -> Iterator[tuple[str, list[list[int]], Position]]:
    """Yield the key of each direction, the right candidates of its queries, and their positions.

    The arguments are the features [n, D] of images, and what `encode_captions` returns.
    """
    own = [sorted({place[caption] for caption in those}) for those in captions]
    images_of: list[list[int]] = [[] for _ in place]
    for row, those in enumerate(own):
        for column in those:
            images_of[column].append(row)
    yield "image_to_text", own, search_candidates(image, text, own)
    yield "text_to_image", images_of, search_candidates(text, image, images_of)


def image_retrieval(target: Target) -> Examined:
    """Return how often the images nearest to an image show the same thing; see `search_images`.

    Raises:
        InputError: no image has another one of its class or caption.
    """
    findings: list[Finding] = []
    for name, (_, found) in search_images(target.features, labels_of(target)).items():
        hits = {k: found.at(k) for k in RECALL_DEPTHS[:2]}
        findings += target.hits(name, hits, key="recall", title="image->image R@{}, %")
    if not findings:
        raise InputError(
            "tasks: 'image_retrieval' needs images with another one of their class or caption, and "
            "there are none. Give class_names=, or leave 'image_retrieval' out."
        )
    return Examined(findings)


def encode_captions(
    encoder: PairEncoder, source: PairTable, features: PairFeatures
) -> tuple[list[list[str]], dict[str, int], Tensor]:
    """Return all captions of each pair of a set [n], and the row of each in features [m, D]."""
    captions = [captions_of(source, row) for row in features.rows.tolist()]
    distinct = list(dict.fromkeys(chain.from_iterable(captions)))
    known = {caption: i for i, caption in enumerate(features.captions)}
    text = features.text
    fresh = [caption for caption in distinct if caption not in known]
    if fresh:
        known |= {caption: len(text) + i for i, caption in enumerate(fresh)}
        text = torch.cat([text, encoder.texts(fresh)])
    place = {caption: i for i, caption in enumerate(distinct)}
    return captions, place, text[[known[caption] for caption in distinct]]


def paraphrases(target: Target) -> Examined:
    """Return the residue of the second and further captions of each pair, in both directions.

    Image->text: the share of unrelated captions less similar to the image than the paraphrase is.
    Text->image: the share of unrelated images less similar to the paraphrase than its image is. A
    pair's value is the mean over its further captions.

    Raises:
        InputError: no pair has a second caption.
    """
    judge = target.evaluator.judge
    if not judge.rows:
        raise InputError(
            "tasks: 'paraphrases': every caption of `retain` is also one to forget, so there is "
            "nothing to compare with. Give retain pairs with other captions."
        )
    unrelated = target.judged()["retain"]
    others = unrelated.text[distinct_firsts(unrelated)[0]]
    findings = []
    for name in target.evaluator.sources:
        source = target.evaluator.sources[name]
        captions, place, text = encode_captions(target.encoder, source, target.features[name])
        further = [(row, place[c]) for row, those in enumerate(captions) for c in those[1:]]
        if not further:
            continue
        rows, columns = (torch.tensor(those) for those in zip(*further, strict=True))
        images, texts = target.features[name].image[rows], text[columns]
        matched = (images * texts).sum(1)
        paraphrased = np.bincount(rows.numpy(), minlength=len(captions))
        similarities = images @ others.T, texts @ unrelated.image.T
        for (key, title), similarity in zip(DIRECTIONS.items(), similarities, strict=True):
            below = share_below(matched.double(), similarity.double())
            total = np.bincount(rows.numpy(), weights=below, minlength=len(captions))
            with np.errstate(invalid="ignore"):  # pairs without a paraphrase have no value
                values = total / paraphrased
            named = {"key": f"{key}_residue", "title": f"{title} residue of paraphrases, %"}
            findings.append(target.of_set(name, values, **named, chance=0.5, aim=" chance"))
    if not findings:
        raise InputError(
            "tasks: 'paraphrases' measures the second and further captions of pairs, and no pair "
            "has any. Give lists of captions, or leave 'paraphrases' out."
        )
    return Examined(findings)
