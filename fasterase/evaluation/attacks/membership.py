"""Membership inference: can one tell that the forgotten pairs were once trained on?

Pairs that a model was trained on tend to be more similar than others of the same source. After
forgetting they should be neither more nor less similar than pairs that were never trained on: both
tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.findings import Examined, Finding, Label, Series, Target, share_finding
from fasterase.evaluation.scores import share_below

# False positives that an accusation may cost, and non-members without which such a rate means
# nothing: three of 300.
FALSE_POSITIVES, ENOUGH = 0.01, 300
BIN = 0.05  # of the histograms of cosines
TITLES = {"cosine": "matched cosine", "change": "matched cosine minus the original's"}


def membership(target: Target) -> Examined:
    """Tell members, which the original was trained on, from non-members by their similarity.

    The score of a pair is the cosine of its image with its first caption; with an original also
    that cosine minus the original's, which is what somebody with both models would look at.
    Members are the judged pairs of each set to forget, and of retain for comparison. AUC is the
    share of non-members below a member, ties half; where there are `ENOUGH` non-members, TPR is
    the share of members above the score that 1 % of the non-members reach. Costs one pass over the
    non-members.

    Raises:
        InputError: fewer than two non-members can be read.
    """
    strangers = target.non_members
    assert strangers is not None
    if len(strangers.rows) < 2:
        raise InputError(
            "attacks: 'membership' needs two non-members or more, of the same source as the pairs "
            "to forget. Give more pairs as non_members, or leave 'membership' out."
        )
    # The pairs to keep, which are there for comparison, come last.
    names = dict(sorted(target.evaluator.judge.rows.items(), key=lambda each: each[0] == "retain"))
    features = {name: target.features[name].at(rows) for name, rows in names.items()}
    features["non-members"] = strangers
    scores = {"cosine": {name: matched_cosine(those) for name, those in features.items()}}
    before = None if target.name == "original" else target.original
    if before is not None and target.original_non_members is not None:
        originals = {name: before[name].at(rows) for name, rows in names.items()}
        originals["non-members"] = target.original_non_members
        scores["change"] = {n: _change(those, originals[n]) for n, those in features.items()}
    findings: list[Finding] = []
    series: list[Series] = []
    for key in scores:
        panel, others = TITLES[key], scores[key]["non-members"]
        for name in names:
            wanted = "" if name == "retain" else "↓ chance"
            group, place = f"{name} against non-members, {panel}", f"{name}/{key}"
            below = share_below(*map(torch.from_numpy, (scores[key][name], others)))
            label = Label(f"{place}/auc", group, "AUC, %", wanted, 0.5)
            findings.append(target.resampled(below, label))
            if len(others) >= ENOUGH:
                found, wanted = found_members(scores[key][name], others), wanted[:1]
                title = "TPR at 1 % FPR, %"
                label = Label(f"{place}/tpr", group, title, wanted, FALSE_POSITIVES)
                findings.append(share_finding(found, label))
        series += _histograms(scores[key], panel=f"{target.name}: {panel}", x_label=panel)
    return Examined(findings, series)


def matched_cosine(pairs: PairFeatures) -> np.ndarray:
    """Return [n], the cosine of each image with the first caption of its pair."""
    return (pairs.image * pairs.first_text).sum(1).double().numpy()


def found_members(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return [n], 1 for members above the lowest threshold that `FALSE_POSITIVES` allow."""
    from sklearn.metrics import roc_curve

    is_member = np.repeat([1, 0], [len(members), len(others)])
    rates, _, thresholds = roc_curve(
        is_member, np.concatenate([members, others]), drop_intermediate=False
    )
    return (members >= thresholds[rates <= FALSE_POSITIVES][-1]).astype(float)


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
