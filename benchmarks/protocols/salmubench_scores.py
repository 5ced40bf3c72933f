"""What SALMUBench measures of a model, pair by pair.

RetFail      1 / rank of the pair's caption among it and 2,000 others, of `forget` and of the
             generic retain pairs (half of each)
AssocStr     cosine of image and caption, `forget`
ACS          does a logistic regression tell pairs of `forget` from pairs with another's caption
IdZSC        is the nearest name that of the persona; `forget`, personas of whom nothing is kept
CoreAssoc    cosine of the image with "name value" or "value name", whichever is higher
InterIdSim, IntraIdSim, VisIdInt, FragSim
             cosine of image and caption: other personas, other facts of the same personas,
             generic captions of the same personas, generic pairs listed as easily damaged
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.protocols.utility import Score
from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.attacks.features import assign_folds, fit_linear, matched_cosine
from fasterase.evaluation.evaluator import sampled_rows
from fasterase.evaluation.zero_shot import encode_classes, score_accuracy
from fasterase.pairs.table import PairTable

FORGET, ASSOCIATION, IDENTITY, RETAIN = SPLITS = (
    *("forget", "holdout_association"),
    *("holdout_identity", "retain_synth"),
)
GEN_KNOW = "GenKnow"
MEASURES = (
    *("RetFail", "AssocStr", "ACS", "IdZSC", "CoreAssoc", GEN_KNOW),
    *("InterIdSim", "IntraIdSim", "VisIdInt", "FragSim"),
)
DISTRACTORS = 1000  # captions of `forget`, and as many generic ones
NAME_TEMPLATE = "a photo of {}"
SEED = 42
# Images compared at a time with all distractors: 16 MB.
CHUNK = 2048


class Personas(NamedTuple):
    """What the json files of the evaluation set say."""

    names: Mapping[str, str]  # by identity
    facts: Mapping[str, Mapping[str, Any]]  # by identity, then field: text or a list of texts
    fields: Mapping[str, str]  # file name of a picture -> field of the fact that its caption states
    fragile: frozenset[str]  # file names

    def core_prompts(self, identity: str, file: str, caption: str) -> list[str]:
        """Return name and value of the fact in both orders; nothing if the files do not say it."""
        value = self.facts.get(identity, {}).get(self.fields.get(file, ""))
        values = list(map(str, value if isinstance(value, list) else [value] if value else []))
        # Of several e-mail addresses the caption has one.
        values = [each for each in values if each in caption] or values
        name = self.names.get(identity)
        return [text for each in values for text in (f"{name} {each}", f"{each} {name}")]


class _Split(NamedTuple):
    """Of all pairs of a split, [n] each: who is in the picture ("": nobody), file, caption."""

    identity: np.ndarray
    file: np.ndarray
    caption: np.ndarray

    @classmethod
    def of(cls, pairs: PairTable) -> _Split:
        metas = [pairs.meta(row) for row in range(len(pairs))]
        columns = [[each.get(key, "") for each in metas] for key in ("identity_id", "file_name")]
        captions = [texts[0] if len(texts) else "" for texts in pairs.every_text()]
        return cls(*(np.array(each, dtype=object) for each in (*columns, captions)))


def open_scores(
    splits: Mapping[str, PairTable], personas: Personas, max_pairs: int | None
) -> Score:
    """Return what scores a model: measure -> [n] of each pair that it is about, NaN for others.

    Args:
        splits: `SPLITS` -> their pairs.
        max_pairs: pairs measured of each split; None: all.
    """
    about = {name: _Split.of(pairs) for name, pairs in splits.items()}
    forget, retain = about[FORGET], about[RETAIN]
    generic = retain.identity == ""
    joint = np.isin(retain.identity, forget.identity) & ~generic
    fragile = np.isin(retain.file, list(personas.fragile)) & generic
    rng = np.random.default_rng(SEED)
    distractors: list[str] = []
    for captions in (forget.caption, retain.caption[generic]):
        drawn = rng.choice(len(captions), min(DISTRACTORS, len(captions)), replace=False)
        distractors += captions[drawn].tolist()
    wanted = {name: np.arange(len(pairs)) for name, pairs in splits.items()}
    wanted[RETAIN] = np.flatnonzero(joint | fragile)
    rows = {
        name: every[sampled_rows(len(every), max_pairs, seed=0)] for name, every in wanted.items()
    }

    def score(encoder: PairEncoder) -> dict[str, np.ndarray]:
        features = {n: encoder.pairs(splits[n], rows[n], description=n) for n in splits}
        pairs = features[FORGET]
        own = _Split(*(column[pairs.rows] for column in forget))
        cosines = {name: matched_cosine(each) for name, each in features.items()}
        kept = features[RETAIN].rows
        return {
            "RetFail": reciprocal_ranks(
                pairs, own.caption, distractors, encoder.texts(distractors)
            ),
            "AssocStr": cosines[FORGET],
            "ACS": told_apart(pairs),
            "IdZSC": _named(encoder, pairs, own, about[ASSOCIATION], personas),
            "CoreAssoc": _core_cosines(encoder, pairs, own, personas),
            "InterIdSim": cosines[IDENTITY],
            "IntraIdSim": cosines[ASSOCIATION],
            "VisIdInt": cosines[RETAIN][joint[kept]],
            "FragSim": cosines[RETAIN][fragile[kept]],
        }

    return score


def reciprocal_ranks(
    pairs: PairFeatures, captions: np.ndarray, distractors: list[str], gallery: Tensor
) -> np.ndarray:
    """Return [n]: 1 / (1 + number of other captions that are more similar to the image).

    Args:
        captions: [n] of the pairs. A distractor of the same words is no other caption.
        distractors: [m] texts.
        gallery: [m, D] their features.
    """
    _, number = np.unique([*captions, *distractors], return_inverse=True)
    own, others = number[: len(captions), None], number[None, len(captions) :]
    cosine = (pairs.image * pairs.first_text).sum(1, keepdim=True)
    above = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(own), CHUNK):
        part = slice(start, start + CHUNK)
        higher = (pairs.image[part] @ gallery.T > cosine[part]).numpy()
        above.append((higher & (own[part] != others)).sum(1))
    return 1 / (1 + np.concatenate(above))


def told_apart(pairs: PairFeatures) -> np.ndarray:
    """Return [about n] 1 where a probe is right about a pair, or about one with another's caption.

    A caption that is the pair's own by chance is left out; NaN if too few are another's.

    It sees the products of image and text features (whose sum is the cosine), and is fitted on one
    half of the pairs.
    """
    count = len(pairs.rows)
    shuffled = np.random.default_rng(SEED).permutation(count)
    captions = np.array(pairs.first_captions, dtype=object)
    is_other = captions[shuffled] != captions
    true, false = (
        (pairs.image * pairs.first_text[order]).double().numpy()
        for order in (np.arange(count), shuffled)
    )
    fitted = assign_folds(count, 2, seed=SEED) == 0 if count > 1 else np.ones(count, bool)
    if not (is_other & fitted).any() or not (is_other & ~fitted).any():
        return np.full(count, np.nan)
    judge = fit_linear(true[fitted], false[fitted & is_other])
    right = judge(true[~fitted]) > 0, judge(false[~fitted & is_other]) < 0
    return np.concatenate(right).astype(np.float64)


def _named(
    encoder: PairEncoder, pairs: PairFeatures, own: _Split, kept: _Split, personas: Personas
) -> np.ndarray:
    """Return [n] 1 where the persona's name is the nearest; NaN where another fact is kept."""
    whole = {who for who in own.identity if who in personas.names} - set(kept.identity)
    if not whole:
        return np.full(len(own.identity), np.nan)
    number = {who: i for i, who in enumerate(sorted(whole))}
    labels = np.array([number.get(who, -1) for who in own.identity])
    names = [personas.names[who] for who in number]
    return score_accuracy(
        pairs.image, encode_classes(encoder.texts, names, [NAME_TEMPLATE]), labels
    )


def _core_cosines(
    encoder: PairEncoder, pairs: PairFeatures, own: _Split, personas: Personas
) -> np.ndarray:
    """Return [n] the highest cosine of the image with a core prompt; NaN without one."""
    prompts = [personas.core_prompts(*each) for each in zip(*own, strict=True)]
    place = {text: i for i, text in enumerate(dict.fromkeys(chain.from_iterable(prompts)))}
    text = encoder.texts(list(place)) if place else pairs.image[:0]
    values = np.full(len(prompts), np.nan)
    for i, each in enumerate(prompts):
        if each:
            values[i] = float((text[[place[prompt] for prompt in each]] @ pairs.image[i]).max())
    return values
