"""Probes: can the pictures of the concept still be told from all others by their features alone?

Erasing changes which caption a picture is nearest to. Its features may still set it apart, and a
few labelled pictures then bring the class back without any text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fasterase.errors import InputError
from fasterase.evaluation.findings import FALSE_POSITIVES, Examined, Finding, Target
from fasterase.evaluation.scores import share_below
from fasterase.seeds import Stream, generator

FOLDS = 5

# Features of images to forget [p, D] and of others [q, D] -> a score of features [n, D].
Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def probe(target: Target) -> Examined:
    """Tell images to forget from unrelated ones by a linear probe and by class prototypes.

    Both are fitted on four fifths of the judged `forget` images and of the unrelated retain images,
    and score the last fifth, five times over. The further sets to forget are never fitted: their
    images are scored by the five fits in turn, against the same unrelated images. Costs five small
    fits of scikit-learn on features that were computed anyway; no model runs.

    Raises:
        InputError: fewer than two images to forget or unrelated ones.
    """
    evaluator = target.evaluator
    images = {name: those.image.double().numpy() for name, those in target.judged().items()}
    unrelated, forget = images.pop("retain"), images["forget"]
    folds = min(FOLDS, len(forget), len(unrelated))
    if folds < 2:
        raise InputError(
            f"attacks: 'probe' needs two images or more of each kind, found {len(forget)} to "
            f"forget and {len(unrelated)} unrelated. Give more pairs, or leave 'probe' out."
        )
    fold_of = {
        name: assign_folds(len(those), folds, seed=evaluator.seed)
        for name, those in (*images.items(), ("retain", unrelated))
    }
    findings: list[Finding] = []
    for key, title, fit in (
        ("linear_probe", "linear probe of image features", fit_linear),
        ("prototypes", "prototypes of image features", fit_prototypes),
    ):
        below = {name: np.empty(len(those)) for name, those in images.items()}
        chance = {name: np.empty(len(those)) for name, those in images.items()}
        for fold in range(folds):
            unseen = fold_of["retain"] == fold
            score = fit(forget[fold_of["forget"] != fold], unrelated[~unseen])
            others = score(unrelated[unseen])
            # A random image is above all but `FALSE_POSITIVES` of the others so often.
            count = len(others)
            by_chance = (count - np.ceil((1 - FALSE_POSITIVES) * count) + 1) / (count + 1)
            for name, those in images.items():
                rows = fold_of[name] == fold
                tried = torch.from_numpy(score(those[rows]))
                below[name][rows] = share_below(tried, torch.from_numpy(others))
                chance[name][rows] = by_chance
        for name in images:
            findings += target.separation(
                below[name],
                key=f"{name}/{key}",
                group=f"{name}, {title}",
                chance=float(chance[name].mean()),
            )
    return Examined(findings)


def assign_folds(count: int, folds: int, *, seed: int) -> np.ndarray:
    """Return [count] the fold of each row, in sizes that differ by one at most."""
    return generator(seed, Stream.PROBE).permutation(count) % folds


def fit_linear(forget: np.ndarray, others: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a balanced logistic regression (L2, C = 1) on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    balanced = LogisticRegression(class_weight="balanced", max_iter=1000)
    classes = np.repeat([1, 0], [len(forget), len(others)])
    fitted = make_pipeline(StandardScaler(), balanced)
    return fitted.fit(np.concatenate([forget, others]), classes).decision_function


def fit_prototypes(forget: np.ndarray, others: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Score by the cosine with the mean image to forget, minus that with the mean other one."""
    near, far = (mean / np.linalg.norm(mean) for mean in (forget.mean(0), others.mean(0)))
    return lambda those: those @ (near - far)
