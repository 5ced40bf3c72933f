"""From a name to sets and on to an erasure, on drawings and a small CLIP that knows them."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

import fasterase
from fasterase.cli import main
from fasterase.demo import emoji
from fasterase.encode import PairEncoder
from fasterase.errors import InputError
from fasterase.finder.decisions import Decision
from fasterase.finder.found import Found
from tests.finder.conftest import IN_PASSING, NAMES, look
from tests.marks import SHORT_RUN

SETS = ("forget", "retain", "unseen", "unsure")


def ids(pairs):
    return [pairs.id(i) for i in range(len(pairs))]


def texts(pairs):
    return [pairs.texts(i)[0] for i in range(len(pairs))]


def count_reads(monkeypatch):
    """Count the pairs that any encoder reads."""
    read = []
    batches = PairEncoder.batches

    def counted(self, source, rows, **options):
        read.extend(rows.tolist())
        return batches(self, source, rows, **options)

    monkeypatch.setattr(PairEncoder, "batches", counted)
    return read


def test_both_witnesses_forget_neither_retains_one_is_unsure(found):
    forget, retain = found
    to_forget = texts(forget) + texts(found.unseen)
    assert len(to_forget) == 14
    assert all(any(name in text for name in NAMES) for text in to_forget)
    assert {text for text in texts(found.unsure) if "MELON" in text} == {
        f"{name} and MELON" for name in IN_PASSING
    }
    assert texts(found.unsure)[:2] == ["a picture", "a picture"], "the nameless ones are nearest"
    assert not any(re.search("|".join(NAMES), text) for text in texts(retain))
    every = [id for name in SETS for id in ids(getattr(found, name))]
    assert sorted(every) == sorted(ids(found.source))
    assert set(ids(found.neighbours)) < set(ids(retain))
    counts = found.counts
    assert counts["unsure by caption alone"] == len(IN_PASSING)
    assert [counts[name] for name in SETS] == [len(getattr(found, name)) for name in SETS]
    assert f"{counts['unsure']}" in repr(found)


def test_a_picture_alone_if_that_is_asked_for(found, corpus, cache):
    alone = look(corpus, cache, picture_alone=True)
    assert texts(alone.forget).count("a picture") + texts(alone.unseen).count("a picture") == 2
    assert alone.counts["unsure"] < found.counts["unsure"]


def test_example_images_and_what_it_is_not_about(corpus, cache, found):
    banana = next(id for id in ids(found.source) if id.startswith("noto") and "1F34C" in id)
    picture = Image.open(corpus.parent / banana)
    with pytest.warns(UserWarning, match="forget is empty: .* found.review"):
        shown = fasterase.find(
            str(emoji.BASE_MODEL),
            corpus,
            "yellow thing",
            images=[corpus.parent / banana, picture],
            reference_cache=cache,
            progress=False,
        )
    assert ids(shown.unsure)[0] == banana
    with pytest.warns(UserWarning, match="forget is empty"):
        other = look(corpus, cache, not_about=["a picture of a fruit", *NAMES])
    assert other.counts["forget"] == 0


def test_a_sample_leaves_the_others_out_of_all_sets(corpus, cache):
    found = look(corpus, cache, max_pairs=60)
    assert found.counts["not judged"] == len(found.source) - 60
    assert sum(len(getattr(found, name)) for name in SETS) == 60
    assert found.counts["forget"] > 8, "at random, 6 of them would be in the sample"


def test_an_interrupted_search_goes_on(corpus, tmp_path, monkeypatch):
    read = count_reads(monkeypatch)
    look(corpus, tmp_path, max_pairs=100)
    assert len(read) == 100
    found = look(corpus, tmp_path)
    assert len(read) == len(found.source) > 150


def test_unreadable_pairs_are_in_no_set(corpus, tmp_path):
    rows = list(csv.reader(corpus.read_text(encoding="utf-8").splitlines()))[:40]
    rows = [rows[0], *([str(corpus.parent / file), text] for file, text in rows[1:])]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    table = tmp_path / "corpus.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*rows, ["broken.png", "a picture of melon"]])
    with pytest.warns(UserWarning, match=r"broken\.png"):
        found = look(table, tmp_path / "cache")
    assert found.counts["not judged"] == 1
    assert "broken.png" not in [id for name in SETS for id in ids(getattr(found, name))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concept": " "}, "concept: expected words"),
        ({"concept": []}, "concept is empty"),
        ({"not_about": [3]}, "not_about: expected words"),
        ({"max_pairs": 0}, "max_pairs=0"),
        ({"max_pairs": 1.5}, "max_pairs=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"images": "no folder"}, "images: no folder is no image"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"images": []}, "`images` is empty"),
        ({"source": [(Image.new("RGB", (8, 8)), "a red apple")] * 2, "concept": "dog"}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:find")
def test_wrong_arguments_are_named(options, said, corpus):
    given = {"source": corpus, "concept": "melon", "progress": False, **options}
    if said is None:
        assert fasterase.find(str(emoji.BASE_MODEL), **given).counts["forget"] == 0
        return
    with pytest.raises(InputError, match=said):
        fasterase.find(str(emoji.BASE_MODEL), **given)


def test_decisions_move_pairs_and_split_reads_them(found, corpus, tmp_path):
    fruit, mention, kept = ids(found.unsure)[0], ids(found.unsure)[-1], ids(found.neighbours)[0]
    unseen, forgotten = ids(found.unseen)[0], ids(found.forget)[0]
    lines = ["id,decision", f"{fruit},forget", f"{mention},retain", f"{kept},unsure"]
    lines += [f"{unseen},forget", f"{forgotten},forget"]
    file = tmp_path / "decisions.csv"
    file.write_text("\n".join(lines) + "\n")
    before = found.counts
    assert found.apply(file) is found
    assert {fruit, forgotten} < set(ids(found.forget))
    assert unseen in ids(found.unseen)
    assert mention in ids(found.retain)
    assert kept in ids(found.unsure)
    after = found.counts
    assert (after["forget"], after["unsure"]) == (before["forget"] + 1, before["unsure"] - 1)
    forget, retain = fasterase.split(corpus, forget=file)
    assert sorted(ids(forget)) == sorted([fruit, unseen, forgotten])
    assert len(retain) == len(found.source) - 4
    assert kept not in ids(retain)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,decision\nx.png,forget\n", r"1 of the 1 ids .* name no pair, such as 'x.png'"),
        ("id,decision\nx.png,keep\n", "row 2 .* one of forget, retain, unsure"),
        ("x.png\n", "holds no decisions"),
    ],
)
def test_wrong_decisions_are_named(text, said, found, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        found.apply(tmp_path / "d.csv")


def test_a_saved_folder_gives_the_same_sets_and_takes_decisions(found, tmp_path):
    found.save(tmp_path / "sets")
    again = Found.load(tmp_path / "sets")
    for name in (*SETS, "neighbours"):
        assert getattr(again, name).digest() == getattr(found, name).digest()
    assert json.loads((tmp_path / "sets/found.json").read_text())["counts"] == found.counts
    written = {path.name for path in (tmp_path / "sets").iterdir()}
    tables = {f"{name}.csv" for name in (*SETS, "neighbours")}
    assert written == tables | {"found.json", "found.npz", "review.html"}
    forget, _ = fasterase.split(tmp_path / "sets/forget.csv", forget=r"melon")
    assert texts(forget)
    moved = ids(found.unsure)[0]
    (tmp_path / "sets/decisions.csv").write_text(f"id,decision\n{moved},forget\n")
    assert moved in ids(Found.load(tmp_path / "sets").forget)


def test_a_folder_whose_corpus_has_changed_or_was_no_path_is_refused(found, corpus, tmp_path):
    with pytest.raises(InputError, match="no folder that `fasterase find` wrote"):
        Found.load(tmp_path)
    found.save(tmp_path)
    facts = json.loads((tmp_path / "found.json").read_text())
    for change, said in (
        ({"digest": "other"}, "have changed since. Run `fasterase find` again"),
        ({"opened": None}, "was no path, so it cannot be opened again"),
    ):
        changed = {**facts, "corpus": {**facts["corpus"], **change}}
        (tmp_path / "found.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            Found.load(tmp_path)


@SHORT_RUN
@pytest.mark.filterwarnings("ignore:retain. .* look like")
def test_unlearn_reads_no_picture_again_and_records_where_its_pairs_came_from(
    found, cache, monkeypatch
):
    read, before_training = count_reads(monkeypatch), []
    found.codes[found.codes == Decision.UNSEEN] = Decision.FORGET
    result = fasterase.unlearn(
        str(emoji.BASE_MODEL),
        *found,
        forget_sets={"unseen": found.unseen},
        sets={"neighbours": found.neighbours},
        reference_cache=str(cache),
        max_steps=1,
        lr=1e-6,
        forget_words=False,
        evaluation=None,
        progress=False,
        callback=lambda record: before_training.append(len(read)),
    )
    assert before_training == [0]
    assert set(result.sets) == {"forget", "retain", "neighbours"}, "no pair is unseen"
    record = result._record()["found"]
    assert record["concept"] == list(NAMES)
    assert record["counts"] == found.counts
    assert str(cache.parent) not in json.dumps(record)


@pytest.mark.slow
@SHORT_RUN
def test_the_command_line_from_a_corpus_to_a_report(corpus, tmp_path, capsys):
    sets, run = str(tmp_path / "sets"), tmp_path / "run"
    model = str(emoji.BASE_MODEL)
    flags = ["--model", model, "--data", str(corpus), "--output_dir", sets, "--progress", "false"]
    assert main(["find", *flags, "--concept", *NAMES]) == 0
    said = capsys.readouterr().out
    assert "forget: 11, and 3 unseen" in said
    assert f"--found {sets}" in said
    nearest = (tmp_path / "sets/unsure.csv").read_text(encoding="utf-8").splitlines()[1]
    moved = nearest.partition(",")[0].rpartition("/")[2]
    (tmp_path / "sets/decisions.csv").write_text(f"id,decision\n{moved},forget\n")
    flags = ["--model", model, "--found", sets, "--output_dir", str(run), "--progress", "false"]
    flags += ["--max_steps", "2", "--lr", "1e-6"]
    assert main(["unlearn", *flags]) in (0, 4)
    evaluation = json.loads((run / "evaluation.json").read_text())["scores"]
    assert set(evaluation) == {"forget", "retain", "unseen", "neighbours"}
    assert not (run / "reference").exists(), "the features are those of the search"
    record = json.loads((run / "model/provenance.json").read_text())
    assert record["data"]["forget"]["pairs"] == record["found"]["counts"]["forget"] == 12
    assert "forget" in (run / "report.md").read_text()
    flags = ["--model", str(run / "model"), "--found", sets]
    assert main(["evaluate", *flags]) in (0, 4)
    flags = ["--model", model, "--data", str(corpus), "--output_dir", sets, "--concept", "dog"]
    assert main(["find", *flags]) == 2
    assert "holds what was found of grapes, melon" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_give_ids_and_every_process_the_same(tmp_path, capsys):
    from tests.parallel.launched import run, torchrun

    shard = str(emoji.shards("noto")[0])
    flags = ["--model", str(emoji.BASE_MODEL), "--data", shard, "--concept", "banana", "bacon"]
    flags += ["--max_pairs", "300", "--progress", "false"]
    assert main(["find", *flags, "--output_dir", str(tmp_path / "one")]) == 0
    run(torchrun("fasterase", "find", *flags, "--output_dir", str(tmp_path / "two")))
    one, two = (np.load(tmp_path / name / "found.npz") for name in ("one", "two"))
    assert (one["codes"] == two["codes"]).mean() > 0.99
    np.testing.assert_allclose(one["scores"], two["scores"], atol=1e-4)
    forget, _ = fasterase.split(shard, forget=tmp_path / "one" / "forget.txt")
    assert ids(forget) == ids(Found.load(tmp_path / "one").forget)
