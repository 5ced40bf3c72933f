"""Attacks on features alone: swapped towers, probes, and membership inference.

docs/attacks.md says what each of them asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.findings import (
    FALSE_POSITIVES,
    NON_MEMBERS,
    Examined,
    Finding,
    Series,
    Target,
    UnsuitableModelError,
)
from fasterase.evaluation.scores import first_copies, share_below
from fasterase.evaluation.tasks import fit_logistic
from fasterase.evaluation.verdict import features_at
from fasterase.seeds import Stream, generator

FOLDS = 5

# Features of images to forget [p, D] and of others [q, D] -> a score of features [n, D].
Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]

# False positives that an accusation may cost, and non-members without which such a rate means
# nothing: three of 300.
ACCUSED, ENOUGH = 0.01, 300
BIN = 0.05  # of the histograms of cosines
TITLES = {"cosine": "matched cosine", "change": "matched cosine minus the original's"}


def swap(target: Target) -> Examined:
    """Judge the original's images with the model's texts, and the original's texts with its images.

    Unrelated pairs are swapped in the same way. No model runs.

    Raises:
        InputError: the model's features have another width than the original's.
    """
    original, judge = target.original, target.evaluator.judge
    assert original is not None
    width, before = (each["retain"].image.shape[1] for each in (target.features, original))
    if width != before:
        raise UnsuitableModelError(
            f"attacks: 'swap' compares one model's images with the other's texts, but features of "
            f"the model have {width} numbers and those of the original {before}. Leave 'swap' out."
        )
    findings, own = [], target.features
    for key, group, images, texts in (
        ("original_images", "the original's images with the model's texts", original, own),
        ("original_texts", "the model's images with the original's texts", own, original),
    ):
        mixed = {name: replace(texts[name], image=images[name].image) for name in judge.rows}
        findings += target.traces(judge.judge(mixed), key=key, group=group)
    return Examined(findings)


def probe(target: Target) -> Examined:
    """Tell images to forget from unrelated ones by a linear probe and by class prototypes.

    Both are fitted on four fifths of the judged `forget` images and of the unrelated retain images,
    and score the last fifth, five times over. The further sets to forget are never fitted: their
    images are scored by the five fits in turn, against the same unrelated images. No fit scores a
    copy of an image that it has seen. No model runs.

    Raises:
        InputError: fewer than two images to forget or unrelated ones.
    """
    judged = target.two_of_each("probe")
    features = {name: those.image for name, those in judged.items()}
    fold_of = fold_images(features, seed=target.evaluator.seed)
    folds = 1 + int(fold_of["forget"].max())
    images = {name: those.double().numpy() for name, those in features.items()}
    unrelated, forget = images.pop("retain"), images["forget"]
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
            others = torch.from_numpy(score(unrelated[unseen]))
            # A random image is above all but `FALSE_POSITIVES` of the others so often.
            count = len(others)
            by_chance = (count - np.ceil((1 - FALSE_POSITIVES) * count) + 1) / (count + 1)
            for name, those in images.items():
                rows = fold_of[name] == fold
                if not rows.any():
                    continue  # a further set to forget may have fewer images than there are folds
                below[name][rows] = share_below(torch.from_numpy(score(those[rows])), others)
                chance[name][rows] = by_chance
        for name, values in below.items():
            place, group, by_chance = f"{name}/{key}", f"{name}, {title}", chance[name].mean()
            findings += target.separation(values, key=place, group=group, chance=float(by_chance))
    return Examined(findings)


def assign_folds(count: int, folds: int, *, seed: int) -> np.ndarray:
    """Return [count] the fold of each row, in sizes that differ by one at most."""
    return generator(seed, Stream.PROBE).permutation(count) % folds


def fold_images(images: Mapping[str, Tensor], *, seed: int) -> dict[str, np.ndarray]:
    """Return set -> [n] the fold of each image, of `FOLDS` or as many as have images of each kind.

    Their sizes differ by one image at most, copies not counted: these share a fold, in all sets to
    forget.
    """
    first = {name: first_copies(those) for name, those in images.items()}
    folds = min(FOLDS, *(len(np.unique(first[name])) for name in ("forget", "retain")))
    fold_of = {}
    for name, those in images.items():
        pictures, place = np.unique(first[name], return_inverse=True)
        fold_of[name] = assign_folds(len(pictures), folds, seed=seed)[place]
        if name not in ("forget", "retain"):
            known = first_copies(torch.cat([images["forget"], those]))[len(images["forget"]) :]
            is_known = known < len(images["forget"])
            fold_of[name][is_known] = fold_of["forget"][known[is_known]]
    return fold_of


def fit_linear(forget: np.ndarray, others: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a balanced logistic regression (L2, C = 1) on standardised features."""
    classes = np.repeat([1, 0], [len(forget), len(others)])
    images = np.concatenate([forget, others])
    return fit_logistic(images, classes, class_weight="balanced").decision_function


def fit_prototypes(forget: np.ndarray, others: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Score by the cosine with the mean image to forget, minus that with the mean other one."""
    near, far = (mean / np.linalg.norm(mean) for mean in (forget.mean(0), others.mean(0)))
    return lambda those: those @ (near - far)


def membership(target: Target) -> Examined:
    """Tell members, which the original was trained on, from non-members by their similarity.

    The score of a pair is the cosine of its image with its first caption; with an original also
    that cosine minus the original's. Members are the judged pairs of each set to forget, and of
    retain for comparison. AUC is the share of non-members below a member, ties half; where there
    are `ENOUGH` non-members, TPR is the share of members above 99 % of them.

    Raises:
        InputError: fewer than two non-members can be read.
    """
    others = target.features[NON_MEMBERS]
    if len(others.rows) < 2:
        raise InputError(
            "attacks: 'membership' needs two non-members or more, of the same source as the pairs "
            "to forget. Give more pairs as non_members, or leave 'membership' out."
        )
    # The pairs to keep, which are there for comparison, come last.
    rows = dict(sorted(target.evaluator.judge.rows.items(), key=lambda each: each[0] == "retain"))

    def judged(features: Mapping[str, PairFeatures]) -> dict[str, PairFeatures]:
        return {**features_at(features, rows), "non-members": features[NON_MEMBERS]}

    now = judged(target.features)
    scores = {"cosine": {name: matched_cosine(those) for name, those in now.items()}}
    if target.original is not None and target.name != "original":
        before = judged(target.original)
        scores["change"] = {name: _change(those, before[name]) for name, those in now.items()}
    findings: list[Finding] = []
    series: list[Series] = []
    for key, found in scores.items():
        panel, strangers = TITLES[key], found["non-members"]
        for name in rows:
            wanted = "" if name == "retain" else "↓ chance"
            group, place = f"{name} against non-members, {panel}", f"{name}/{key}"
            below = share_below(*map(torch.from_numpy, (found[name], strangers)))
            findings.append(target.share(below, f"{place}/auc", group, "AUC, %", wanted, 0.5))
            if len(strangers) >= ENOUGH:
                caught = found_members(found[name], strangers)
                text = f"{place}/tpr", group, "TPR at 1 % FPR, %", wanted[:1]
                findings.append(target.share(caught, *text, ACCUSED, are_trials=True))
        series += _histograms(found, panel=f"{target.name}: {panel}", x_label=panel)
    return Examined(findings, series)


def matched_cosine(pairs: PairFeatures) -> np.ndarray:
    """Return [n], the cosine of each image with the first caption of its pair."""
    return (pairs.image * pairs.first_text).sum(1).double().numpy()


def found_members(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return [n], 1 for members that at most `ACCUSED` of the others reach, else 0."""
    reach = (others >= members[:, None]).mean(1)
    return (reach <= ACCUSED).astype(float)


def _change(now: PairFeatures, before: PairFeatures) -> np.ndarray:
    """Return [n], how far the matched cosine of pairs that both models could read has moved."""
    rows = np.intersect1d(now.rows, before.rows)
    return matched_cosine(now.at(rows)) - matched_cosine(before.at(rows))


def _histograms(scores: Mapping[str, np.ndarray], *, panel: str, x_label: str) -> list[Series]:
    """Return what share of each set falls into each bin, over the range that all sets need."""
    low = min(those.min() for those in scores.values())
    high = max(those.max() for those in scores.values())
    edges = np.arange(np.floor(low / BIN), np.floor(high / BIN) + 2) * BIN
    axes = x_label, "share of the set's pairs, %", edges.tolist()
    lines = []
    for name, those in scores.items():
        levels = [*(100 * np.histogram(those, edges)[0] / len(those)).tolist(), 0.0]
        lines.append(Series(panel, *axes, levels, kind="steps", line=name))
    return lines
