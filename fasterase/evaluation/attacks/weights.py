"""Attacks on weights: rounding them, and fine-tuning them on a few pairs of the concept.

An erasure with small steps moves each weight by less than a 4-bit grid is wide, and rounding may
undo it (Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization", ICLR 2025).

Fine-tuning on a few pairs shows whether an association is gone or only hidden: a model that never
saw the concept has to learn it, one that hides it only has to be reminded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasterase.encode import PairFeatures
from fasterase.evaluation.findings import (
    Examined,
    Finding,
    Series,
    Target,
    UnsuitableModelError,
    recall_finding,
    share_finding,
)
from fasterase.evaluation.verdict import PairTraces, decide, summarise
from fasterase.models.dual_encoder import DualEncoder, separate_copy
from fasterase.models.preprocessing import Tokens
from fasterase.numerals import counted
from fasterase.ops.contrastive import contrastive
from fasterase.pairs.batches import sweep
from fasterase.pairs.prepare import hash_captions
from fasterase.seeds import Stream, generator

BITS = (8, 4)  # of the rounded weights
# Attention has either one matrix for queries, keys and values, or three.
MATRICES = (
    (nn.Linear, ("weight",)),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
)

SHOTS = (1, 2, 4, 8, 16)  # forget pairs that the attacker has; at most half of them
POOL = 32  # retain pairs that the attacker has; at most half of them
STEPS = 20
RATES = (1e-5, 1e-4)  # the one counts that brings more back with the most pairs
BETAS = (0.9, 0.98)

RELEARNED, KEPT = "forget pairs relearned", "retain image->text R@1, %"  # labels of axes


def quantise(target: Target) -> Examined:
    """Judge the model again with the weights of its linear layers rounded to 8 and to 4 bits.

    Rounding is to nearest, symmetric, with one scale per output row; activations stay as they are.
    Recall on unrelated retain pairs says what the rounding costs by itself: a model that it breaks
    has forgotten everything. Costs one pass over the judged pairs per number of bits, and a second
    copy of the linear layers in memory. The model gets its own weights back.

    Raises:
        InputError: the model has no linear layer with floating-point weights.
    """
    weights = linear_weights(target.encoder.model.module)
    if not weights:
        raise UnsuitableModelError(
            "attacks: 'quantise' rounds the weights of linear layers (nn.Linear and "
            f"nn.MultiheadAttention), and {target.encoder.model.name} has none in floating point. "
            "Leave 'quantise' out."
        )
    judge = target.evaluator.judge
    findings = []
    for bits in BITS:
        key, group = f"{bits}_bits", f"{bits}-bit weights"
        with rounded(weights, bits):
            features = target.encode(judge.rows, group)
        traces = judge.judge(features, target.original)
        verdict = decide(summarise(traces))
        assert verdict is not None
        findings.append(Finding(f"{key}/verdict", group, "verdict", "verdict", "", verdict))
        findings.append(recall_finding(features["retain"], key=f"retain/{key}", group=group))
        findings += target.traces(traces, key=key, group=group)
    return Examined(findings)


def linear_weights(module: nn.Module) -> list[Tensor]:
    """Return the floating-point matrices of linear layers, those inside attention included.

    Projections that a library keeps as bare parameters, embeddings and convolutions stay out.
    """
    found = [
        weight
        for part in module.modules()
        for kind, names in MATRICES
        if isinstance(part, kind)
        for name in names
        if (weight := getattr(part, name)) is not None and weight.is_floating_point()
    ]
    return list({id(weight): weight for weight in found}.values())


@contextmanager
def rounded(weights: Sequence[Tensor], bits: int) -> Iterator[None]:
    """Round `weights` in the block; afterwards each holds its own storage again, bit for bit."""
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = round_to_nearest(weight.data, bits)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return `scale * round(weight / scale)`, scale = max |row| / (2^(bits - 1) - 1), [out, in]."""
    levels = 2 ** (bits - 1) - 1
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, 1)
    return ((values / scale).round() * scale).to(weight.dtype)


class Lesson(NamedTuple):
    """Pairs to fine-tune on, on the model's device."""

    pixels: Tensor  # [n, 3, H, W]
    tokens: Tokens  # [n, L]
    labels: Tensor  # [n] int64, equal for equal captions; on the CPU


class Outcome(NamedTuple):
    """What is measured on the left-over pairs."""

    traces: dict[str, PairTraces]  # set to forget -> what is known of it
    retain: PairFeatures

    @property
    def recovered(self) -> tuple[float, float]:
        """How much of the forget set is back: hit@1, and the residue where hits are equal."""
        forget = self.traces["forget"]
        return float(forget.hit.mean()), float(forget.residue.mean())


def relearn(target: Target) -> Examined:
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
        InputError: fewer than two pairs to forget or unrelated ones.
    """
    evaluator = target.evaluator
    rows = {name: pairs.rows for name, pairs in target.two_of_each("relearn").items()}
    lessons, left = _divide(rows, seed=evaluator.seed)
    shots = [k for k in SHOTS if k <= len(lessons["forget"])]
    forget, retain = (_load(target, name, lessons[name]) for name in ("forget", "retain"))
    judge, features = evaluator.judge, target.features
    before = {name: features[name].at(those) for name, those in left.items()}
    outcomes = [Outcome(judge.judge(before), before["retain"])]
    last = shots[-1]
    pairs = sum(k + len(retain.labels) for k in [*shots, *[last] * (len(RATES) - 1)]) * STEPS

    def relearned(k: int, rate: float) -> Outcome:
        lesson = Lesson(forget.pixels[:k], forget.tokens.index(slice(k)), forget.labels[:k])
        encoder = target.encoder.of(fine_tuned(target.encoder.model, lesson, retain, rate))
        student = replace(target, encoder=encoder)
        after = student.encode(left, "relearned")
        bar.update(STEPS * (k + len(retain.labels)))
        return Outcome(judge.judge(after), after["retain"])

    with target.encoder.progress("relearning", pairs) as bar:
        tried = {rate: relearned(last, rate) for rate in RATES}
        best = max(RATES, key=lambda rate: tried[rate].recovered)
        outcomes += [relearned(k, best) for k in shots[:-1]]
        outcomes.append(tried[best])
    return _describe(target, [0, *shots], outcomes)


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


def _describe(
    target: Target,
    shots: list[int],  # from 0
    outcomes: list[Outcome],  # of each of `shots`
) -> Examined:
    pairs = [counted(k, "pair") for k in shots]
    keys = [f"{k}_shots" for k in shots]
    recalls = [
        recall_finding(
            outcome.retain,
            key=f"retain/{key}",
            group="retain, after relearning",
            title=f"retain image->text R@1, {count}, %",
        )
        for outcome, key, count in zip(outcomes, keys, pairs, strict=True)
    ]
    findings, series = [], []
    recall = [100 * float(each.value) for each in recalls]
    ticks, places = [str(k) for k in shots], [float(place) for place in range(len(shots))]
    for name in outcomes[0].traces:
        traces = [outcome.traces[name] for outcome in outcomes]
        for key, figure, wanted, chance, values in (
            ("residue", "residue", "↓ chance", 0.5, [trace.residue for trace in traces]),
            ("contest_hit@1", "hit@1", "↓", traces[0].chance, [trace.hit for trace in traces]),
        ):
            area = np.average(values[1:], axis=0, weights=area_weights(shots[1:]))
            labels = [*pairs, "area under the curve"]
            for point, label, those in zip([*keys, "area"], labels, [*values, area], strict=True):
                # Single hits are few trials, often all alike.
                few = figure == "hit@1" and point != "area"
                make = share_finding if few else target.resampled
                place, group = f"{name}/{point}/{key}", f"{name}, after relearning"
                findings.append(make(those, place, group, f"{figure}, {label}, %", wanted, chance))
            curve = [100 * float(those.mean()) for those in values]
            of_others = f"{figure} of the others, %"
            panel = f"{name}: {figure}"
            series.append(Series(panel, RELEARNED, of_others, places, curve, ticks=ticks))
        # The last curve, hit@1, again: on the plane of damage against relearning.
        plane = f"{name}: damage against relearning"
        series.append(Series(plane, KEPT, of_others, recall, curve, point_labels=ticks))
    return Examined([*findings, *recalls], series)


def area_weights(shots: list[int]) -> np.ndarray:
    """Return the trapezoidal weights of values at `shots`, over log k; one value has weight 1."""
    if len(shots) == 1:
        return np.ones(1)
    gaps = np.diff(np.log(shots))
    return (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2
