"""Relearning: how many pairs of the concept does it take to bring all of it back?

Fine-tuning on a few pairs shows whether an association is gone or only hidden: a model that never
saw the concept has to learn it, one that hides it only has to be reminded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.figures import Found, Series, recall_figure, share_figure
from fasterase.evaluation.metrics import bootstrap_intervals
from fasterase.evaluation.target import Target
from fasterase.models.dual_encoder import DualEncoder, separate_copy
from fasterase.models.preprocessing import Tokens
from fasterase.ops.contrastive import contrastive
from fasterase.pairs.batches import sweep
from fasterase.pairs.prepare import hash_captions
from fasterase.seeds import Stream, generator

SHOTS = (1, 2, 4, 8, 16)  # forget pairs that the attacker has; at most half of them
POOL = 32  # retain pairs that the attacker has; at most half of them
STEPS = 20
RATES = (1e-5, 1e-4)  # the one counts that brings more back with the most pairs
BETAS = (0.9, 0.98)

RESIDUE, HIT = "residue", "contest_hit@1"


class Lesson(NamedTuple):
    """Pairs to fine-tune on, on the model's device."""

    pixels: Tensor  # [n, 3, H, W]
    tokens: Tokens  # [n, L]
    labels: Tensor  # [n] int64, equal for equal captions; on the CPU


class Outcome(NamedTuple):
    """What is measured on the left-over pairs."""

    values: dict[str, dict[str, np.ndarray]]  # metric -> set to forget -> per pair
    chance: dict[str, dict[str, float]]  # metric -> set
    retain: PairFeatures

    @property
    def recovered(self) -> tuple[float, float]:
        """How much of the forget set is back: hit@1, and the residue where hits are equal."""
        hit, residue = (self.values[metric]["forget"].mean() for metric in (HIT, RESIDUE))
        return float(hit), float(residue)


def relearn(target: Target) -> Found:
    """Fine-tune copies of the model on k = 1, 2, 4, ... forget pairs, and measure all the others.

    Each copy takes `STEPS` steps of Adam on every weight, with InfoNCE over the k pairs and a fixed
    pool of retain pairs; both weigh the same, so that one pair counts. The learning rate of the
    whole curve is the one of `RATES` that brings more back with the largest k. Residue and hit@1
    are those of the verdict, on forget pairs and among unrelated pairs that no copy learned from.
    The area is that under the curve from the smallest to the largest k, over log k, as a share: a
    constant curve has its own height as area.

    Costs `STEPS` steps and one pass over the judged pairs for each k, and once more for the other
    learning rate, and memory for an fp32 copy of the model with gradients and Adam's states.

    Raises:
        InputError: fewer than two forget pairs or unrelated retain pairs.
    """
    evaluator = target.evaluator
    rows = {name: target.features[name].at(r).rows for name, r in evaluator.judge.rows.items()}
    lessons, left = _divide(rows, seed=evaluator.seed)
    shots = [k for k in SHOTS if k <= len(lessons["forget"])]
    forget, retain = (_load(target, name, lessons[name]) for name in ("forget", "retain"))
    outcomes = [_measure(target, {name: target.features[name].at(r) for name, r in left.items()})]
    last = shots[-1]
    pairs = sum(k + len(retain.labels) for k in [*shots, *[last] * (len(RATES) - 1)]) * STEPS

    def relearned(k: int, rate: float) -> Outcome:
        lesson = Lesson(forget.pixels[:k], forget.tokens.index(slice(k)), forget.labels[:k])
        encoder = target.encoder.of(fine_tuned(target.encoder.model, lesson, retain, rate))
        outcome = _measure(target, _encode(encoder, target, left))
        bar.update(STEPS * (k + len(retain.labels)))
        return outcome

    with target.encoder.progress_bar("relearning", pairs) as bar:
        tried = {rate: relearned(last, rate) for rate in RATES}
        best = max(RATES, key=lambda rate: tried[rate].recovered)
        outcomes += [relearned(k, best) for k in shots[:-1]]
        outcomes.append(tried[best])
    return _describe([0, *shots], outcomes, resamples=evaluator.resamples, seed=evaluator.seed)


def fine_tuned(model: DualEncoder, forget: Lesson, retain: Lesson, rate: float) -> DualEncoder:
    """Return a copy of `model` after `STEPS` steps on both lessons, in fp32 and eval mode.

    The loss is the mean of two means: over forget and over retain rows of
    `(ce_row + ce_col) / 2`, in one similarity matrix, equal captions being each other's positives.
    """
    with torch.inference_mode(False), torch.enable_grad():
        student = separate_copy(model)
        student.module.float().eval()
        weights = [weight for weight in student.module.parameters() if weight.is_floating_point()]
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr=rate, betas=BETAS)
        labels = torch.cat([forget.labels, retain.labels])
        count = len(forget.labels)
        for _ in range(STEPS):
            image = torch.cat([student.encode_image(part.pixels) for part in (forget, retain)])
            text = torch.cat([student.encode_text(part.tokens) for part in (forget, retain)])
            losses = contrastive(image, text, student.scale(), labels=labels, backend="dense")
            each = (losses.ce_row + losses.ce_col) / 2
            ((each[:count].mean() + each[count:].mean()) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        student.module.requires_grad_(False)
    return student


def _divide(
    rows: Mapping[str, np.ndarray], *, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the rows to learn from, in order, and the sorted rows to measure, of each set."""
    lessons, left = {}, dict(rows)
    for place, (name, most) in enumerate((("forget", max(SHOTS)), ("retain", POOL))):
        count = min(most, len(rows[name]) // 2)
        if count < 1:
            raise InputError(
                f"attacks: 'relearn' needs two pairs or more of each kind, found "
                f"{len(rows['forget'])} to forget and {len(rows['retain'])} unrelated to keep. "
                "Give more pairs, or leave 'relearn' out."
            )
        order = generator(seed, Stream.RELEARN, place).permutation(rows[name])
        lessons[name], left[name] = order[:count], np.sort(order[count:])
    return lessons, left


def _load(target: Target, name: str, rows: np.ndarray) -> Lesson:
    source, prepare = target.evaluator.sources[name], target.encoder.prepare
    (batch,) = sweep(source, rows, prepare, captions="first", batch_size=len(rows))
    assert isinstance(batch.pixels, Tensor)
    assert isinstance(batch.tokens, Tokens)
    keys = [key for _, key in batch.captions]
    place = {key: i for i, key in enumerate(batch.new_keys)}
    device = target.encoder.model.device
    return Lesson(
        batch.pixels.to(device),
        batch.tokens.index([place[key] for key in keys]).to(device),
        torch.from_numpy(hash_captions(keys).astype(np.int64)),
    )


def _encode(
    encoder: PairEncoder, target: Target, rows: Mapping[str, np.ndarray]
) -> dict[str, PairFeatures]:
    return {
        name: encoder.pairs(
            target.evaluator.sources[name], those, description=f"relearned ({name})", leave=False
        )
        for name, those in rows.items()
    }


def _measure(target: Target, features: Mapping[str, PairFeatures]) -> Outcome:
    traces = target.evaluator.judge.judge(features)
    return Outcome(
        {
            RESIDUE: {n: (t.image_to_text + t.text_to_image) / 2 for n, t in traces.items()},
            HIT: {n: t.hit for n, t in traces.items()},
        },
        {RESIDUE: dict.fromkeys(traces, 0.5), HIT: {n: t.chance for n, t in traces.items()}},
        features["retain"],
    )


def _describe(
    shots: list[int],  # from 0
    outcomes: list[Outcome],  # of each of `shots`
    *,
    resamples: int,
    seed: int,
) -> Found:
    pairs = [f"{k} pair{'' if k == 1 else 's'}" for k in shots]
    keys = [f"{k}_shots" for k in shots]
    recalls = [
        recall_figure(
            outcome.retain,
            key=f"retain/{key}",
            group="retain, after relearning",
            title=f"retain image->text R@1, {count}, %",
        )
        for outcome, key, count in zip(outcomes, keys, pairs, strict=True)
    ]
    figures, series = [], []
    for name in outcomes[0].values[HIT]:
        curves = {}
        for metric, title, wanted in ((RESIDUE, "residue", "↓ chance"), (HIT, "hit@1", "↓")):
            values = [outcome.values[metric][name] for outcome in outcomes]
            area = np.average(values[1:], axis=0, weights=area_weights(shots[1:]))
            means = {**dict(zip(keys, values, strict=True)), "area": area}
            intervals = bootstrap_intervals(means, {}, resamples=resamples, seed=seed)
            if metric == HIT:  # few trials, often all alike
                intervals = {"area": intervals["area"]}
            titles = [*pairs, "area under the curve"]
            for (key, those), label in zip(means.items(), titles, strict=True):
                figures.append(
                    share_figure(
                        those,
                        key=f"{name}/{key}/{metric}",
                        group=f"{name}, after relearning",
                        title=f"{title}, {label}, %",
                        wanted=wanted,
                        chance=outcomes[0].chance[metric][name],
                        interval=intervals.get(key),
                    )
                )
            curves[title] = [100 * float(those.mean()) for those in values]
        series += _plot(name, shots, curves, [100 * float(each.value) for each in recalls])
    return Found([*figures, *recalls], series)


def _plot(
    name: str, shots: list[int], curves: Mapping[str, list[float]], recall: list[float]
) -> list[Series]:
    """Return the curves of a set, and hit@1 on the plane of damage against relearning."""
    ticks = [str(k) for k in shots]
    places = [float(place) for place in range(len(shots))]
    relearned, kept = "forget pairs relearned", "retain image->text R@1, %"
    lines = [
        Series(f"{name}: {title}", relearned, f"{title} of the others, %", places, y, ticks=ticks)
        for title, y in curves.items()
    ]
    plane = f"{name}: damage against relearning"
    hits = curves["hit@1"]
    lines.append(Series(plane, kept, "hit@1 of the others, %", recall, hits, point_labels=ticks))
    return lines


def area_weights(shots: list[int]) -> np.ndarray:
    """Return the trapezoidal weights of values at `shots`, over log k; one value has weight 1."""
    if len(shots) == 1:
        return np.ones(1)
    gaps = np.diff(np.log(shots))
    return (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2
