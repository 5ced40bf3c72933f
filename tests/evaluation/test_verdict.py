"""The verdict: its words, and what they say of the demo's models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pytest

import fasterase
from fasterase.demo import emoji
from fasterase.demo.sets import open_teams
from fasterase.encode import PairEncoder
from fasterase.evaluation.verdict import Judge, Trace, decide, decide_each, summarise
from fasterase.models.load import load_model
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.table import PairTable


def trace(
    image: float = 0.5,
    text: float = 0.5,
    hit_low: float = 0.0,
    chance: float = 0.05,
    hit_high: float = 0.2,
    towers: Sequence[float] = (),
) -> Trace:
    """Of an image tower and a text tower with these low ends."""
    found = {name: (low, low) for name, low in zip(("image", "text"), towers, strict=False)}
    return Trace(image, text, hit_low, hit_low, hit_high, chance, 50, found)


KNOWN, GONE, ABSENT = trace(1.0, 1.0, 0.9), trace(), trace(0.1, 0.5)
FEW = trace(hit_high=0.3)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (GONE, "forgotten"),
        (trace(0.75, 0.75), "forgotten"),
        (trace(0.76, 0.5), "remembered"),
        (trace(0.5, 0.76), "remembered"),
        (trace(0.5, 0.5, hit_low=0.1), "forgotten"),
        (trace(0.5, 0.5, hit_low=0.11), "remembered"),
        (trace(0.5, 0.5, hit_low=0.4, chance=0.2), "forgotten"),
        (trace(0.5, 0.5, hit_low=0.41, chance=0.2), "remembered"),
        (trace(0.25, 0.25), "forgotten"),
        (trace(0.24, 0.5), "over-erased"),
        (trace(0.5, 0.24), "over-erased"),
        (trace(0.1, 0.9), "remembered"),
        (trace(0.1, 0.1, hit_low=0.2), "remembered"),
        # One tower gives it away, beside the original's other one.
        (trace(towers=(0.5, 0.5)), "forgotten"),
        (trace(towers=(0.51,)), "remembered"),
        (trace(towers=(0.0, 0.51)), "remembered"),
        # No trace was found, but what was seen leaves room for one.
        (trace(hit_high=0.24), "forgotten"),
        (trace(hit_high=0.25), "undecided"),
        (trace(0.2, hit_high=0.25), "over-erased"),
        (trace(0.8, hit_high=0.25), "remembered"),
    ],
)
def test_the_words_and_their_precedence(found: Trace, verdict: str) -> None:
    assert decide({"forget": found}) == verdict
    assert decide({"forget": found}, {"forget": KNOWN}) == verdict
    assert decide({"forget": found}, {"forget": GONE}) == "never known"


@pytest.mark.parametrize(
    ("traces", "known", "verdict"),
    [
        ({"forget": GONE, "a": GONE}, "forget a", "forgotten"),
        ({"forget": GONE, "a": ABSENT}, "forget a", "over-erased"),
        ({"forget": GONE, "a": FEW}, "forget a", "undecided"),
        ({"forget": FEW, "a": ABSENT}, "forget a", "over-erased"),
        ({"forget": ABSENT, "a": KNOWN, "b": GONE}, "forget a b", "remembered"),
        # What was never known counts for nothing, unless nothing was.
        ({"forget": GONE, "a": KNOWN}, "forget", "forgotten"),
        ({"forget": KNOWN, "a": ABSENT}, "a", "over-erased"),
        ({"forget": ABSENT, "a": KNOWN}, "", "never known"),
        ({}, "", None),
    ],
)
def test_the_worst_set_decides(traces: dict[str, Trace], known: str, verdict: str | None) -> None:
    original = {name: KNOWN if name in known.split() else GONE for name in traces}
    assert decide(traces, original) == verdict


def drawings(teams: Sequence[str]) -> tuple[PairTable, dict[str, list[int]]]:
    """The drawings of some teams, and kind of fruit or "retain" -> those that models train on."""
    source = open_teams(teams)
    rows: dict[str, list[int]] = {"retain": []}
    for row in range(len(source)):
        meta = source.meta(row)
        if meta["subgroup"] == emoji.DEFAULT_FORGET:
            rows.setdefault(meta["concept"], []).append(row)
        elif meta["member"]:
            rows["retain"].append(row)
    return source, rows


def test_the_demo_s_models() -> None:
    """The gold standard: a model that never saw the concept has forgotten it, the base has not."""

    def fruit(teams: Sequence[str]) -> PairTable:
        source, rows = drawings(teams)
        of_fruit = (those for name, those in rows.items() if name != "retain")
        return source.select(sorted(chain.from_iterable(of_fruit)), name="fruit")

    source, rows = drawings(emoji.TRAIN_TEAMS)
    found = fasterase.evaluate(
        str(emoji.RETRAINED_MODEL),
        fruit(emoji.TRAIN_TEAMS),
        source.select(rows["retain"], name="kept"),
        forget_sets={"forget-unseen": fruit([emoji.UNSEEN_TEAM])},
        original=str(emoji.BASE_MODEL),
        max_pairs=200,
        progress=False,
    )
    assert found.verdicts == {"model": "forgotten", "original": "remembered"}
    residue, original = found.residue, found.mean_residue("forget", found.original)
    assert residue is not None
    assert 0.55 < residue < 0.75, "it still knows that an apple is food and red"
    assert original is not None
    assert original > 0.99


@pytest.mark.slow
def test_fruit_by_fruit_two_pictures_show_what_is_known_but_not_what_is_gone() -> None:
    source, rows = drawings(emoji.TRAIN_TEAMS)
    sets = {name: source.select(those, name=name) for name, those in rows.items()}
    fruit = [name for name in sets if name != "retain"]
    assert len(fruit) == 19
    judge = Judge(sets, fruit, seed=0)
    found = {}
    for name, folder in (("original", emoji.BASE_MODEL), ("retrained", emoji.RETRAINED_MODEL)):
        encoder = PairEncoder(
            load_model(str(folder)),
            precision="fp32",
            ledger=SkipLedger(len(source)),
            num_workers=0,
            progress=False,
        )
        found[name] = {
            each: encoder.pairs(pairs, judge.rows[each], description=each)
            for each, pairs in sets.items()
        }
        if name == "original":
            judge.calibrate(encoder, found[name])
    original = summarise(judge.judge(found["original"]))
    retrained = summarise(judge.judge(found["retrained"], found["original"]))
    assert set(decide_each(original).values()) == {"remembered"}
    assert set(decide_each(retrained, original).values()) == {"undecided"}
