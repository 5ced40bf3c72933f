"""Erasures one after the other: what each starts from, forgets and keeps, and what is reported."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from benchmarks.evidence import sequential
from benchmarks.evidence.sequential import HIT, RECALL, SUM, Concepts, State
from fasterase.demo import emoji
from fasterase.demo.sets import Drawings
from fasterase.report.evaluation import Evaluation

# Small subgroups, in an order that is not the alphabet's.
SUBGROUPS = ("plant-flower", "animal-marine", "food-asian")
FLOWERS, MARINE, ASIAN = SUBGROUPS
CROWDED = {FLOWERS: 0.3, MARINE: 0.2, ASIAN: 0.1}


@pytest.fixture(scope="module")
def concepts() -> Concepts:
    return sequential.build_concepts(SUBGROUPS, seed=0)


def names_of(concepts: Concepts, *subgroups: str) -> set[str]:
    return {name for each in subgroups for name in concepts.own[each].concepts}


def evaluation(
    *, known: dict[str, float], kept: float, verdict: str = "forgotten", residue: float = 0.4
) -> Evaluation:
    """What is measured on a model that knows a share of each set to forget."""
    trace = {"image_to_text_residue": residue, "text_to_image_residue": residue + 0.2}
    trace["matched_cosine"] = -0.1
    scores = {name: {HIT: share, **trace} for name, share in {"forget": 0.5, **known}.items()}
    scores |= {name: {RECALL: kept} for name in sequential.KEEP_SETS}
    chance = {name: {HIT: 0.05} for name in scores}
    verdicts = {"model": dict.fromkeys(["forget", *known], verdict)}
    return Evaluation(scores, {}, chance, {}, {}, set_verdicts=verdicts)


def test_every_erasure_starts_from_a_model_made_before():
    states = sequential.plan(SUBGROUPS, seeds=2)
    assert len({state.name for state in states}) == len(states) == 2 * 10
    for number, state in enumerate(states):
        if state.erased:
            assert State(state.erased[:-1], state.seed) in states[:number]
    titles = [state.title for state in states if state.seed == 1]
    together = "plant-flower + animal-marine + food-asian"
    assert titles[:2] == ["nothing", together]
    assert titles.count(f"{together}, as a mapping") == 1
    assert sum(state.is_mapping for state in states) == 2
    assert titles[-2:] == [
        "plant-flower, then animal-marine, then food-asian",
        "food-asian, then animal-marine, then plant-flower",
    ]


def test_one_split_of_what_all_erasures_keep(concepts):
    everything = names_of(concepts, *SUBGROUPS)
    assert set(concepts.together.concepts) == everything
    kept = set(concepts.together.retain.names), set(concepts.together.holdout.names)
    assert not kept[0] & kept[1]
    near = set(concepts.neighbour.names)
    assert near
    assert near <= kept[0] | kept[1]
    assert not everything & (kept[0] | kept[1])


def test_concepts_are_kept_until_their_turn_and_left_out_afterwards(concepts):
    always = set(concepts.together.retain.names)
    assert set(concepts.retain([FLOWERS]).names) == always | names_of(concepts, MARINE, ASIAN)
    assert set(concepts.retain([FLOWERS, MARINE]).names) == always | names_of(concepts, ASIAN)
    assert set(concepts.retain(SUBGROUPS).names) == always
    forget = concepts.forget([MARINE])
    assert set(forget.names) == names_of(concepts, MARINE)
    assert len(forget[0]["text"]) > 1
    assert set(concepts.forget(SUBGROUPS).names) == names_of(concepts, *SUBGROUPS)


def test_runs_continue_from_the_saved_model_and_are_not_repeated(concepts, tmp_path, monkeypatch):
    erased = []

    def erase(model: Path, forget, retain, *, seed: int, folder: Path) -> None:
        is_one = isinstance(forget, Drawings)
        given = set(forget.names) if is_one else {n: set(each.names) for n, each in forget.items()}
        erased.append((model, given, set(retain.names), seed, folder))

    monkeypatch.setattr(sequential, "erase", erase)
    monkeypatch.setattr(sequential, "measure", lambda *_, **__: evaluation(known={}, kept=1.0))
    cached = functools.cache(lambda subgroups, seed: concepts)
    monkeypatch.setattr(sequential, "build_concepts", cached)
    first, second = State(((FLOWERS,),), 3), State(((FLOWERS,), (MARINE,)), 3)
    both = State(((FLOWERS, MARINE),), 3, is_mapping=True)
    for state in (State((), 3), first, second, second, both):
        sequential.run(state, SUBGROUPS, tmp_path)
    always = set(concepts.together.retain.names)
    later = names_of(concepts, ASIAN)
    flowers, marine = names_of(concepts, FLOWERS), names_of(concepts, MARINE)
    folder = sequential.model_of(first, tmp_path)
    kept, base = always | later, emoji.BASE_MODEL
    two, at_once = (sequential.model_of(each, tmp_path) for each in (second, both))
    assert erased == [
        (base, flowers, kept | marine, 3, folder),
        (folder, marine, kept, 3, two),
        (base, {FLOWERS: flowers, MARINE: marine}, kept, 3, at_once),
    ]
    assert (folder.parent / "evaluation.json").is_file()


def test_rows_say_what_is_gone_and_what_changed():
    before = evaluation(known=dict.fromkeys(SUBGROUPS, 1.0), kept=0.9, verdict="remembered")
    known = {FLOWERS: 0.0, f"{FLOWERS}, unseen": 0.1, ASIAN: 1.0}
    after = evaluation(known=known, kept=0.8)
    state = State(((FLOWERS,), (MARINE,)), 1)
    found = sequential.rows_of(state, after, before, steps=70, crowded=CROWDED)
    rows = {row["set"]: row for row in found}
    assert list(rows) == [*known, *sequential.KEEP_SETS]
    wanted = {name: row["wanted"] for name, row in rows.items()}
    assert [name for name in wanted if wanted[name] == "forget"] == [*known][:2]
    flowers = rows[f"{FLOWERS}, unseen"]
    assert flowers["erased"] == "plant-flower, then animal-marine"
    assert (flowers["seed"], flowers["steps"], flowers["hit@1"]) == (1, 70, 0.1)
    assert flowers["residue"] == pytest.approx(0.5)
    assert flowers["image->text residue"] == pytest.approx(0.4)
    assert flowers["text->image residue"] == pytest.approx(0.6)
    assert (flowers["cosine"], flowers["verdict"]) == (-0.1, "forgotten")
    assert flowers["captions' mutual cosine"] == 0.3
    assert rows["retain"]["recall@1"] == 0.8
    assert rows["retain"]["change"] == pytest.approx(-0.1)


def test_captions_crowd_where_they_are_like_each_other():
    same = sequential.crowding(emoji.BASE_MODEL, ["rose", "rose", "rose"])
    assert same == pytest.approx(1, abs=1e-5)
    assert -1 < sequential.crowding(emoji.BASE_MODEL, ["rose", "rocket"]) < 0.8


def test_sums_add_the_single_erasures_of_each_seed():
    before = evaluation(known=dict.fromkeys(SUBGROUPS, 1.0), kept=0.9)
    rows, half = [], dict.fromkeys(SUBGROUPS, 0.5)
    both = ((FLOWERS,), (MARINE,)), ((FLOWERS, MARINE),)
    for seed in (0, 1):
        for lost, history in enumerate([(), ((FLOWERS,),), ((MARINE,),), *both]):
            after = evaluation(known=half, kept=0.9 - 0.01 * lost - 0.1 * seed)
            state = State(history, seed)
            rows += sequential.rows_of(state, after, before, steps=70, crowded=CROWDED)
    sums = sequential.sum_singles(rows, SUBGROUPS)
    found = {(row["seed"], row["set"]): row["change"] for row in sums}
    assert len(found) == 2 * len(sequential.KEEP_SETS)
    assert found[0, "holdout"] == pytest.approx(-0.01 - 0.02)
    assert found[1, "holdout"] == pytest.approx(-0.11 - 0.12)

    lines = sequential.table([*rows, *sums], SUBGROUPS).splitlines()
    assert lines[0].split(" | ")[-3:] == ["retain", "neighbour", "holdout |"]
    (line,) = (line for line in lines if line.startswith(f"| {SUM} |"))
    assert line.split(" | ")[-3:] == ["-13.0", "-13.0", "-13.0 |"]
    (line,) = (line for line in lines if line.startswith("| plant-flower, then animal-marine |"))
    assert "50 / 50" in line
    assert line.split(" | ")[-1] == "-8.0 |"
