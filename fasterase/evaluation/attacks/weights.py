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
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.findings import (
    Examined,
    Finding,
    Series,
    Target,
    UnsuitableModelError,
)
from fasterase.evaluation.metrics import CONTEST_HIT
from fasterase.evaluation.placebo import nonsense_captions
from fasterase.evaluation.scores import are_copies, distinct_firsts, first_copies
from fasterase.evaluation.verdict import PairTraces, decide, features_at, summarise
from fasterase.models.dual_encoder import DualEncoder, separate_copy
from fasterase.models.preprocessing import Tokens
from fasterase.numerals import counted
from fasterase.ops.contrastive import contrastive
from fasterase.pairs.batches import sweep
from fasterase.pairs.prepare import hash_captions
from fasterase.progress import Progress
from fasterase.seeds import Stream, generator
from fasterase.vocabulary import UNREADABLE

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
CONTROL = "made_up"  # in keys: of the curve with made-up words

Names = Mapping[str, str]  # caption -> the same with made-up words

RELEARNED, KEPT = "forget pairs relearned", "retain image->text R@1, %"  # labels of axes


def quantise(target: Target) -> Examined:
    """Judge the model again with the weights of its linear layers rounded to 8 and to 4 bits.

    Costs one pass over the judged pairs for each, and a second copy of the linear layers in memory.

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
        findings.append(target.recall(features["retain"], key=f"retain/{key}", group=group))
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
    captions: list[str]  # [n] their identities

    def first(self, count: int) -> Lesson:
        tokens = self.tokens.index(slice(count))
        return Lesson(self.pixels[:count], tokens, self.captions[:count])


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

    Residue and hit@1 are those of the verdict, on pairs whose images no copy learned from. The
    learning rate of a whole curve is the one of `RATES` that brings more back with the largest k.
    The area is that under the curve over log k. `pairs_to_half` is the k at which hit@1 is half of
    what the original has on these pairs (half of all pairs without an original); it is left out
    where that is no more than chance. The control, `made_up`, teaches the same pictures with
    `nonsense_captions` in place of the concept's; docs/attacks.md says what it shows.

    Costs `STEPS` steps and one pass over the judged pairs for each k, and once more for the other
    learning rate, all of it twice with the control, and memory for an fp32 copy of the model with
    gradients and Adam's states.

    Raises:
        InputError: fewer than two images to forget or unrelated ones.
    """
    evaluator = target.evaluator
    lessons, left = _divide(target.two_of_each("relearn"), seed=evaluator.seed)
    shots = [k for k in SHOTS if k <= len(lessons["forget"])]
    forget, retain = (_load(target, name, lessons[name]) for name in ("forget", "retain"))
    courses = {"": _Course(target, forget, retain, left, {})}
    names = _nonsense(target)
    if names is not None:
        captions = [names[caption] for caption in forget.captions]
        tokens = target.encoder.model.tokenize(captions).to(forget.pixels.device)
        made_up = Lesson(forget.pixels, tokens, captions)
        courses[CONTROL] = _Course(target, made_up, retain, left, names)
    tried = [*shots, *shots[-1:] * (len(RATES) - 1)]
    pairs = sum(k + len(retain.captions) for k in tried) * STEPS
    with target.encoder.progress("relearning", pairs * len(courses)) as bar:
        outcomes = {curve: course.outcomes(shots, bar) for curve, course in courses.items()}
    goals = dict.fromkeys(outcomes[""][0].traces, 0.5)
    if target.original is not None:
        known = evaluator.judge.judge(features_at(target.original, left))
        goals = {name: float(traces.hit.mean()) / 2 for name, traces in known.items()}
    shots = [0, *shots]
    found = [_describe(target, shots, those, goals, curve) for curve, those in outcomes.items()]
    found.append(_describe_damage(target, shots, outcomes[""]))
    return Examined(*(list(chain.from_iterable(parts)) for parts in zip(*found, strict=True)))


class _Course(NamedTuple):
    """What the copies learn, and what is left to measure."""

    target: Target
    forget: Lesson
    retain: Lesson
    left: Mapping[str, np.ndarray]
    names: Names  # what is measured in place of captions to forget; empty: they are

    def outcomes(self, shots: list[int], bar: Progress) -> list[Outcome]:
        """Return what is known before, and after each number of `shots`, from 1."""
        tried = {rate: self._relearned(shots[-1], rate, bar) for rate in RATES}
        best = max(RATES, key=lambda rate: tried[rate].recovered)
        before = self._measure(self.target, features_at(self.target.features, self.left))
        return [before, *(self._relearned(k, best, bar) for k in shots[:-1]), tried[best]]

    def _relearned(self, k: int, rate: float, bar: Progress) -> Outcome:
        encoder = self.target.encoder
        student = fine_tuned(encoder.model, self.forget.first(k), self.retain, rate)
        target = replace(self.target, encoder=encoder.of(student))
        bar.update(STEPS * (k + len(self.retain.captions)))
        return self._measure(target, target.encode(self.left, "relearned"))

    def _measure(self, target: Target, features: dict[str, PairFeatures]) -> Outcome:
        """Judge `features` of the target's model."""
        for name, pairs in features.items():
            if self.names and name != "retain":
                rows, own = distinct_firsts(pairs)
                captions = [self.names[pairs.captions[row]] for row in rows]
                text, pair_text = target.encoder.texts(captions), [[place] for place in own]
                features[name] = replace(pairs, text=text, captions=captions, pair_text=pair_text)
        return Outcome(target.evaluator.judge.judge(features), features["retain"])


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
        keys = [*forget.captions, *retain.captions]
        labels = torch.from_numpy(hash_captions(keys).astype(np.int64))
        count = len(forget.captions)
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
    judged: Mapping[str, PairFeatures], *, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the rows to learn from, in order, and the sorted rows to measure, of each set.

    No image is in both, nor a copy of it: where pictures to forget are to be kept too, retain
    teaches none of those that are measured. `InputError` if nothing would be left.
    """
    lessons: dict[str, np.ndarray] = {}
    seen: list[Tensor] = []
    for place, (name, most) in enumerate((("forget", max(SHOTS)), ("retain", POOL))):
        images = judged[name].image
        pictures = np.unique(first_copies(images))
        count = min(most, len(pictures) // 2)
        pictures = generator(seed, Stream.RELEARN, place).permutation(pictures)
        if name == "retain":
            forget = judged["forget"].image
            measured = forget[torch.from_numpy(~are_copies(forget, seen[0]))]
            pictures = pictures[~are_copies(images[torch.from_numpy(pictures)], measured)]
        lessons[name] = judged[name].rows[pictures[:count]]
        seen.append(images[torch.from_numpy(pictures[:count])])
    left = {
        name: pairs.rows[~are_copies(pairs.image, torch.cat(seen))]
        for name, pairs in judged.items()
    }
    for name, rows in lessons.items():
        if not (len(rows) and len(left[name])):
            raise InputError(
                f"attacks: 'relearn' finds too few pictures in {name!r} that are not in the other "
                "set too. Give more pairs to keep, or leave 'relearn' out."
            )
    return lessons, {name: rows for name, rows in left.items() if len(rows)}


def _load(target: Target, name: str, rows: np.ndarray) -> Lesson:
    source, prepare = target.evaluator.sources[name], target.encoder.prepare
    (batch,) = sweep(source, rows, prepare, captions="first", batch_size=len(rows))
    assert isinstance(batch.pixels, Tensor)
    assert isinstance(batch.tokens, Tokens)
    keys = [key for _, key in batch.captions]
    place = {key: i for i, key in enumerate(batch.new_keys)}
    device = target.encoder.model.device
    tokens = batch.tokens.index([place[key] for key in keys])
    return Lesson(batch.pixels.to(device), tokens.to(device), keys)


def _nonsense(target: Target) -> Names | None:
    """Return what the control says in place of the captions; None if it cannot say anything."""
    judged = target.judged()
    kept = judged.pop("retain").first_captions
    captions = {caption for pairs in judged.values() for caption in pairs.first_captions}
    names = nonsense_captions(captions, kept, target.evaluator.seed)
    if names is None or target.encoder.model.text_tokenizer is None:
        return None
    try:
        target.encoder.model.tokenize([*names.values()])
    except UNREADABLE:  # a tokenizer that knows the words of its own data alone
        return None
    return names


def _describe(
    target: Target,
    shots: list[int],  # from 0
    outcomes: list[Outcome],  # of each of `shots`
    goals: Mapping[str, float],  # set -> the hit@1 to come back to
    curve: str,  # empty, or `CONTROL`
) -> Examined:
    pairs = [counted(k, "pair") for k in shots]
    points = [*(f"{k}_shots" for k in shots), "area"]
    what = "made-up words" if curve else ""
    findings, series = [], []
    ticks, places = [str(k) for k in shots], [float(place) for place in range(len(shots))]
    for name in outcomes[0].traces:
        traces = [outcome.traces[name] for outcome in outcomes]
        group = f"{name}, after relearning {what}".rstrip()
        prefix = f"{name}/{curve}/" if curve else f"{name}/"
        chance_hit = traces[0].chance[CONTEST_HIT]
        if goals[name] > chance_hit:
            needed = pairs_needed(shots, [float(trace.hit.mean()) for trace in traces], goals[name])
            title = f"pairs until hit@1 is {100 * goals[name]:.0f} %"
            key, wanted = f"{prefix}pairs_to_half", "" if curve else "↑"
            findings.append(Finding(key, group, title, "pairs", wanted, needed))
        for key, figure, wanted, chance, values in (
            ("residue", "residue", "↓ chance", 0.5, [trace.residue for trace in traces]),
            (CONTEST_HIT, "hit@1", "↓", chance_hit, [trace.hit for trace in traces]),
        ):
            area = np.average(values[1:], axis=0, weights=area_weights(shots[1:]))
            labels = [*pairs, "area under the curve"]
            for point, label, those in zip(points, labels, [*values, area], strict=True):
                # Single hits are few trials, often all alike.
                few = figure == "hit@1" and point != "area"
                place, title = f"{prefix}{point}/{key}", f"{figure}, {label}, %"
                aim = "" if curve else wanted
                findings.append(
                    target.share(those, place, group, title, aim, chance, are_trials=few)
                )
            of_others = [100 * float(those.mean()) for those in values]
            panel = ", ".join(filter(None, [f"{name}: {figure}", what]))
            y_label = f"{figure} of the others, %"
            series.append(Series(panel, RELEARNED, y_label, places, of_others, ticks=ticks))
    return Examined(findings, series)


def _describe_damage(target: Target, shots: list[int], outcomes: list[Outcome]) -> Examined:
    """Return the recall that is left of retain pairs, and its plane with hit@1."""
    recalls = [
        target.recall(
            outcome.retain,
            key=f"retain/{k}_shots",
            group="retain, after relearning",
            title=f"retain image->text R@1, {counted(k, 'pair')}, %",
        )
        for outcome, k in zip(outcomes, shots, strict=True)
    ]
    recall, ticks = [100 * float(each.value) for each in recalls], [str(k) for k in shots]
    series = []
    for name in outcomes[0].traces:
        hits = [100 * float(outcome.traces[name].hit.mean()) for outcome in outcomes]
        panel, y_label = f"{name}: damage against relearning", "hit@1 of the others, %"
        series.append(Series(panel, KEPT, y_label, recall, hits, point_labels=ticks))
    return Examined(recalls, series)


def pairs_needed(shots: Sequence[int], hits: Sequence[float], goal: float) -> float | str:
    """Return the number of pairs at which `hits` first reach `goal`; words if they never do.

    `hits` follow the number of `shots`, 0 and 1 first; between two of the others they are linear in
    its logarithm, and between 0 and 1 it counts as 1.
    """
    reached = next((place for place, hit in enumerate(hits) if hit >= goal), None)
    if reached is None:
        return f"more than {shots[-1]}"
    if reached < 2:
        return float(shots[reached])
    share = (goal - hits[reached - 1]) / (hits[reached] - hits[reached - 1])
    return float(shots[reached - 1] * (shots[reached] / shots[reached - 1]) ** share)


def area_weights(shots: list[int]) -> np.ndarray:
    """Return the trapezoidal weights of values at `shots`, over log k; one value has weight 1."""
    if len(shots) == 1:
        return np.ones(1)
    gaps = np.diff(np.log(shots))
    return (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2
