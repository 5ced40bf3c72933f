"""Classification of every set: by prompts, by a linear probe, and by class prototypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch

from fasterase.errors import InputError, import_extra
from fasterase.evaluation.figures import Figure, Found
from fasterase.evaluation.scores import search_candidates
from fasterase.evaluation.target import Target
from fasterase.evaluation.zero_shot import encode_classes, label_pairs

DEPTHS = (1, 5)
FOLDS = 2

# Features [n, D] and class numbers [n] to learn from -> class numbers of features [m, D].
Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def zero_shot(target: Target) -> Found:
    """Return each set's zero-shot accuracy, top 1 and top 5, over `class_names`.

    A class is the unit mean of its prompts. Of a set, the pairs with a known class count: the one
    that the source gives, else the one that a caption names. Costs the class prompts through the
    text tower.

    Raises:
        InputError: no classes are known, or no pair has one.
    """
    evaluator = target.evaluator
    if evaluator.class_names is None:
        raise InputError(
            "tasks: 'zero_shot' needs classes. Give class_names=, or sets whose folders are "
            "classes, or leave 'zero_shot' out."
        )
    names = evaluator.class_names
    labels = label_pairs(names, evaluator.sources, target.features)
    if not any((those >= 0).any() for those in labels.values()):
        raise InputError("tasks: 'zero_shot': no pair belongs to one of class_names.")
    classes = encode_classes(target.encoder.texts, names, evaluator.templates)
    figures: list[Figure] = []
    for name, those in labels.items():
        known = those >= 0
        if not known.any():
            continue
        images = target.features[name].image[torch.from_numpy(known)]
        figures += target.hit_figures(
            name,
            search_candidates(images, classes, those[known, None].tolist()),
            {k: k / len(names) for k in DEPTHS if k < len(names)},
            key="accuracy",
            title="zero-shot accuracy, top {}, %",
        )
    return Found(figures)


def linear_probe(target: Target) -> Found:
    """Return each set's accuracy under a linear classifier of its image features.

    Multinomial logistic regression (L2, C = 1) on standardised features, over all labels of all
    sets; see `probe_sets`. Costs two fits of scikit-learn.

    Raises:
        InputError: fewer than two labels have two images.
        MissingExtraError: scikit-learn is not installed (extra `eval`).
    """
    return probe_sets(target, fit_linear, task="linear_probe", title="linear probe accuracy, %")


def prototypes(target: Target) -> Found:
    """Return each set's accuracy by the nearest mean image of a label; see `probe_sets`.

    Raises:
        InputError: fewer than two labels have two images.
    """
    return probe_sets(target, fit_prototypes, task="prototypes", title="prototype accuracy, %")


def probe_sets(target: Target, fit: Fit, *, task: str, title: str) -> Found:
    """Fit a classifier on half of the images of each label, and score the others; then swap.

    A label is the pair's class, or else its first caption. All sets are fitted together: labels
    with two images or more, of whatever set, take part. No text and no tower is involved, so that
    this tells what the image features themselves keep apart.
    """
    labels = image_labels(target)
    joined = np.concatenate([*labels.values()])
    images = torch.cat([target.features[name].image for name in labels]).double().numpy()
    fold = _folds(joined)
    counts = np.bincount(joined)
    taking_part = counts[joined] >= FOLDS
    classes = int((counts >= FOLDS).sum())
    if classes < 2:
        raise InputError(
            f"tasks: {task!r} needs two classes with two images or more, found {classes}. Give "
            f"class_names= or sets with several images per caption, or leave {task!r} out."
        )
    right = np.full(len(joined), np.nan)
    for held_out in range(FOLDS):
        train = taking_part & (fold != held_out)
        test = taking_part & (fold == held_out)
        right[test] = fit(images[train], joined[train])(images[test]) == joined[test]
    figures: list[Figure] = []
    ends = np.cumsum([len(those) for those in labels.values()])[:-1]
    for name, values in zip(labels, np.split(right, ends), strict=True):
        if not np.isnan(values).all():
            figures.append(
                target.mean_figure(name, values, key="accuracy", title=title, chance=1 / classes)
            )
    return Found(figures)


def fit_linear(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a multinomial logistic regression (L2, C = 1) on standardised features."""
    linear = import_extra("sklearn.linear_model", "eval", "tasks: 'linear_probe'")
    scale = import_extra("sklearn.preprocessing", "eval", "tasks: 'linear_probe'").StandardScaler()
    fitted = linear.LogisticRegression(max_iter=1000, tol=1e-3)
    with warnings.catch_warnings():
        # Two images per caption are two per class: half of them are one each.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        fitted.fit(scale.fit_transform(images), labels)
    return lambda those: fitted.predict(scale.transform(those))


def fit_prototypes(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Assign images to the label with the nearest mean, by cosine."""
    known, place = np.unique(labels, return_inverse=True)
    means = np.zeros((len(known), images.shape[1]))
    np.add.at(means, place, images)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return lambda those: known[(those @ means.T).argmax(1)]


def image_labels(target: Target) -> Mapping[str, np.ndarray]:
    """Return set -> [n] number of each pair's class, or else of its first caption."""
    evaluator = target.evaluator
    names = evaluator.class_names or []
    classes = label_pairs(names, evaluator.sources, target.features) if names else {}
    captions: dict[str, int] = {}
    found = {}
    for name in evaluator.sources:
        firsts = [
            captions.setdefault(caption, len(names) + len(captions))
            for caption in target.features[name].first_captions
        ]
        known = classes.get(name, np.full(len(firsts), -1))
        found[name] = np.where(known >= 0, known, firsts)
    return found


def _folds(labels: np.ndarray) -> np.ndarray:
    """Return [n]: the images of a label fall into the folds in turn."""
    seen: dict[int, int] = {}
    folds = np.empty(len(labels), dtype=np.int64)
    for i, label in enumerate(labels.tolist()):
        folds[i] = seen.get(label, 0) % FOLDS
        seen[label] = seen.get(label, 0) + 1
    return folds
