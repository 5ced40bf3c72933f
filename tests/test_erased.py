"""Erasing again: what was erased before leaves the retain set, and is judged once more."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fasterase
from fasterase.cli import main
from fasterase.errors import InputError
from fasterase.evaluation.verdict import EARLIER, NEVER_KNOWN, REMEMBERED, Trace, decide_each
from fasterase.pairs.open import open_pairs
from fasterase.provenance import drop_erased, is_same, read_record, remember
from tests import small_models

STEP = {"lr": 1e-5, "max_steps": 1, "evaluation": None, "progress": False}
COLOURS = ("red", "pink", "blue", "green", "tan", "gold")


@pytest.fixture
def table(tmp_path):
    rows = ["filepath,title"]
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,a {colour} square")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def erase(model, forget, retain, **options):
    return fasterase.unlearn(model, forget, retain, **{**STEP, **options})


@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain.* seem to name")
def test_pairs_that_were_erased_before_are_left_out_of_retain_and_judged(table, tmp_path):
    sets = fasterase.split(table, forget="red|pink")
    model = small_models.open_clip_vit()
    first = erase(model, *sets, concept="warm", tokenizer=small_models.simple_tokenizer())
    saved = str(first.save(tmp_path / "one"))
    again = fasterase.split(table, forget="blue|green")
    with pytest.warns(UserWarning, match=r"left out of retain.*2 'erased before: warm'"):
        second = erase(saved, *again, evaluation="quick")
    assert [second.sets["retain"].id(row) for row in range(2)] == ["4.png", "5.png"]
    assert len(second.sets["retain"]) == 2
    assert len(second.sets[f"{EARLIER}: warm"]) == 2
    assert f"{EARLIER}: warm" in second.traces
    assert second.evaluation.pairs[f"{EARLIER}: warm"] == 2
    report = second.report(tmp_path / "report.md").read_text()
    assert f"{EARLIER}: warm" in report
    both = second.save(tmp_path / "both")
    with pytest.warns(UserWarning, match=r"left out of retain.*2 'erased before: warm'"):
        measured = fasterase.evaluate(str(both), *again, progress=False)
    assert measured.pairs == second.evaluation.pairs
    assert not any("NOT among" in line or "other pairs" in line for line in measured.audit)

    with pytest.raises(InputError, match="all 2 pairs were erased from this model before"):
        erase(saved, again[0], sets[0])
    with pytest.warns(UserWarning, match="left out of retain"):
        silent = erase(saved, *again, remember_erased=False)
    assert read_record(silent.save(tmp_path / "two"))["erased"] is None


@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain.* seem to name")
def test_the_audit_knows_pairs_whatever_they_are_read_from(table, tmp_path, monkeypatch):
    sets = fasterase.split(table, forget="red|pink")
    model = small_models.open_clip_vit()
    saved = erase(model, *sets, tokenizer=small_models.simple_tokenizer()).save(tmp_path / "one")
    flags = ["--data", str(table), "--forget_expression", "red|pink"]
    assert main(["split", *flags, "--output_dir", str(tmp_path / "sets")]) == 0
    files = [str(tmp_path / "sets" / f"{name}.csv") for name in ("forget", "retain")]
    audits = [
        fasterase.evaluate(str(saved), *pairs, progress=False).audit for pairs in (sets, files)
    ]
    assert "its pairs are measured here as 'forget'" in audits[0][2]
    assert audits[0] == audits[1]
    others = fasterase.split(table, forget="red|blue")
    audit = fasterase.evaluate(str(saved), *others, progress=False).audit
    assert audit[2].endswith("its pairs are NOT among the sets measured here")


@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain.* seem to name")
def test_a_saved_model_is_measured_without_the_retain_pairs_that_its_run_left_out(table, tmp_path):
    forget, _ = fasterase.split(table, forget="red|pink")
    retain = tmp_path / "retain.csv"
    header, *rows = table.read_text().splitlines()
    retain.write_text("\n".join([header, *rows[2:], "0.png,a thing"]) + "\n")
    given = forget, str(retain)
    model, tokenizer = small_models.open_clip_vit(), small_models.simple_tokenizer()
    with pytest.warns(UserWarning, match="1 retain pair is also in the forget set and left out"):
        result = erase(model, *given, evaluation="quick", tokenizer=tokenizer)
    saved = str(result.save(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="1 retain pair is also in the forget set and left out"):
        found = fasterase.evaluate(saved, *given, progress=False)
    assert found.pairs == result.evaluation.pairs == {"forget": 2, "retain": 4}
    assert not any("other pairs" in line for line in found.audit)
    # A model without a record is measured on what is given.
    assert fasterase.evaluate(result.model, *given, progress=False).pairs["retain"] == 5


def test_digests_tell_nothing_without_the_pairs(table):
    pairs = open_pairs(str(table), name="forget")
    one, other = remember(pairs), remember(pairs)
    assert set(one) == {"salt", "captions", "images"}
    assert not set(one["captions"]) & set(other["captions"]), "another salt, other digests"
    assert "red" not in json.dumps(one)
    assert is_same(pairs, one)
    assert is_same(pairs.select(np.arange(len(pairs))[::-1]), other)
    assert not is_same(pairs.select([0, 1]), one)
    renamed = table.read_text().replace("a red square", "a rose")
    table.write_text(renamed)
    assert not is_same(open_pairs(str(table), name="forget"), one), "other captions"


def test_a_pair_counts_by_its_picture_or_its_first_caption():
    pixels = torch.arange(5).float().reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    erased = [(pixels[0], ["octopus", "animal"]), (pixels[1], "squid")]
    retain = [
        (pixels[0], "a thing with arms"),
        (pixels[2], "squid"),
        (pixels[3], ["cat", "animal"]),
        (pixels[4], "car"),
    ]
    record = {"erased": remember(open_pairs(erased, name="forget"))}
    with pytest.warns(UserWarning, match="2 'erased before: erasure 2'"):
        kept, dropped = drop_erased(open_pairs(retain, name="retain"), [{}, record])
    assert [kept.texts(row)[0] for row in range(len(kept))] == ["cat", "car"]
    assert len(dropped["erased before: erasure 2"]) == 2


def test_what_comes_back_is_remembered():
    forgotten = Trace(0.6, 0.6, 0, 0, 0.1, 0.05, 30)
    back = Trace(0.8, 0.6, 0, 0, 0.1, 0.05, 30)
    names = (f"{EARLIER}: fruit", "unseen")
    verdicts = decide_each(dict.fromkeys(names, back), dict.fromkeys(names, forgotten))
    assert verdicts == {names[0]: REMEMBERED, names[1]: NEVER_KNOWN}
    same = decide_each({names[0]: forgotten}, {names[0]: forgotten})
    assert same == {names[0]: NEVER_KNOWN}


def test_a_record_of_before_has_no_digests(table, tmp_path):
    pairs = open_pairs(str(table), name="retain")
    assert drop_erased(pairs, [{"concept": None}, {"erased": None}]) == (pairs, {})


@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain.* seem to name")
def test_concepts_in_files_are_kept_apart_from_retain(table, tmp_path):
    header, *rows = table.read_text().splitlines()
    for name, chosen in {"warm": rows[:2], "cold": rows[2:4], "all": rows}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *chosen]) + "\n")
    forget = {name: str(tmp_path / f"{name}.csv") for name in ("warm", "cold")}
    model, tokenizer = small_models.open_clip_vit(), small_models.simple_tokenizer()
    with pytest.warns(UserWarning, match="4 retain pairs are also in the forget set"):
        result = erase(model, forget, str(tmp_path / "all.csv"), tokenizer=tokenizer)
    assert len(result.sets["retain"]) == 2
    assert {name: len(result.sets[name]) for name in ("warm", "cold", "forget")} == {
        "warm": 2,
        "cold": 2,
        "forget": 4,
    }
