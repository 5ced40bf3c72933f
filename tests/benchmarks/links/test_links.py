"""Personas and what is known of them: parts, captions, ranks; the whole command on few steps."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from benchmarks.links import __main__ as links
from benchmarks.links import erasing, models
from benchmarks.links.erasing import Features, Known
from benchmarks.links.personas import KINDS, SENSITIVE, drawings, make_personas
from fasterase.demo import emoji
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from tests.marks import SHORT_RUN


def test_households_share_a_number_and_nothing_else():
    personas = make_personas(0)
    assert personas == make_personas(0) != make_personas(1)
    for kind in ("face", "name", "email"):
        assert len({getattr(each, kind) for each in personas}) == len(personas)
    homes: dict[int, list] = {}
    for each in personas:
        homes.setdefault(each.household, []).append(each)
    assert all(a.phone == b.phone for a, b in homes.values())
    assert len({each.phone for each in personas}) == len(homes)
    # Nobody loses a whole household, and somebody of every part keeps a number that goes.
    assert all([m.part for m in members].count("forget") <= 1 for members in homes.values())
    mates = Counter(b.part for a, b in homes.values() if a.part == "forget")
    assert min(mates["retain"], mates["holdout"]) >= 15
    assert min(Counter(each.part for each in personas).values()) >= 30


def test_captions_say_the_fact_with_the_name_and_without():
    persona = make_personas(0)[0]
    named, bare = persona.captions(SENSITIVE), persona.captions(SENSITIVE, named=False)
    assert set(bare) < set(named)
    assert all(persona.name not in caption for caption in bare)
    assert sum(persona.name in caption for caption in named) == len(named) - len(bare)
    assert all(persona.phone in caption or persona.email in caption for caption in named)
    pairs = drawings([persona], ["name"])
    assert len(pairs) == len(emoji.TRAIN_TEAMS)
    assert pairs[0]["text"] == persona.captions(["name"])


class Knowing(DualEncoder):
    """Stands in for a model whose features are chosen."""

    def __init__(self, text_of, image_of):
        self._text_of, self._image_of = text_of, image_of

    def tokenize(self, texts):
        return texts

    def encode_text(self, texts):
        return torch.stack([self._text_of(text) for text in texts])

    def encode_image(self, pixels):
        return self._image_of


Knowing.__abstractmethods__ = frozenset()


def test_a_link_is_found_by_the_fact_and_never_by_the_name():
    personas = make_personas(0)
    phones = sorted({each.phone for each in personas})

    def one_hot(place):
        return F.one_hot(torch.tensor(place), 2 * len(personas)).float()

    # Text: the number's own direction, and much of the name's. Images: the name's alone.
    names = {each.name: len(personas) + row for row, each in enumerate(personas)}

    def text(caption):
        number = next((i for i, phone in enumerate(phones) if phone in caption), None)
        name = next((row for name, row in names.items() if name in caption), None)
        parts = [one_hot(place) for place in (number, name) if place is not None]
        return torch.stack(parts).sum(0)

    named_images = torch.stack([one_hot(names[each.name]) for each in personas])
    told_images = torch.stack([one_hot(phones.index(each.phone)) for each in personas])
    rows, teams = range(len(personas)), emoji.TRAIN_TEAMS
    knows_names = Features(
        Knowing(text, named_images), personas, dict.fromkeys(teams, named_images)
    )
    assert not knows_names.facts("phone", of=rows, teams=teams).hit.any()
    assert knows_names.facts("name", of=rows, teams=teams).hit.all()
    told = Features(Knowing(text, told_images), personas, dict.fromkeys(teams, told_images))
    for found in (told.facts, told.owners):
        known = found("phone", of=rows, teams=teams)
        assert known.hit.all()  # the other one of the household is no rival
        assert len(known.hit) == len(teams) * len(personas)


def test_ties_are_no_hits():
    known = Known.of(
        torch.tensor([1.0, 1.0]),
        torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
        torch.ones(2, 2, dtype=torch.bool),
    )
    assert known.residue.tolist() == [0.5, 0.5]
    assert not known.hit.any()


def in_this_process(run, cells, *arguments, **_):
    return {cell: run(cell, *arguments) for cell in cells}


@pytest.mark.slow
@SHORT_RUN
def test_the_command_writes_a_row_per_model_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "STEPS", 2)
    monkeypatch.setattr("fasterase.engine.job.MAX_STEPS", 2)
    monkeypatch.setattr(links, "call_all", in_this_process)
    # Relearning trains three models some dozen times each: minutes.
    cheap = {name: keys for name, keys in erasing.ATTACKS.items() if name != "relearn"}
    monkeypatch.setattr(erasing, "ATTACKS", cheap)
    command = ["--seeds", "1", "--methods", "default", "--work", str(tmp_path / "work")]
    links.main([*command, "--output", str(tmp_path)])
    assert "| clean |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "work" / "default_seed0.json").read_text(encoding="utf-8"))
    assert {row["set"] for row in rows} == {*links.SETS, erasing.USUAL, erasing.ATTACKED}
    attacks = [row for row in rows if row["set"] == erasing.ATTACKED]
    assert len(attacks) == sum(len(keys) for keys in cheap.values())
    assert all(0 <= row["value"] <= 1 for row in attacks)
    assert all(0 <= row["hit@1"] <= 1 for row in rows if row not in attacks)
    compromised = load_model(f"local-dir:{tmp_path / 'work' / 'compromised_seed0'}")
    assert compromised.context_length == models.CONTEXT_LENGTH
    captions = [text for each in make_personas(0) for text in each.captions(KINDS)]
    assert (compromised.tokenize(captions).ids[:, -1] == 0).all()  # every fact fits
