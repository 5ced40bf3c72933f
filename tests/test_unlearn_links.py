"""erase="link": what captions say of pictures goes, the pictures and their other captions stay."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fasterase.config import UnlearnConfig
from fasterase.engine import job as job_module
from fasterase.engine import run as run_module
from fasterase.errors import InputError
from fasterase.evaluation.placebo import MARGIN_RESIDUE, Band
from fasterase.evaluation.verdict import Trace
from fasterase.pairs.open import open_pairs
from fasterase.provenance import drop_erased, is_same, remember
from tests.tiny_concepts import AUTOMATIC, FORGET, RETAIN, knowing_model
from tests.tiny_model import LENGTH, erase

# The same pictures with captions of no concept, and one of the pairs to forget.
OTHERWISE = [(image, torch.full((LENGTH,), 17)) for image, _ in FORGET[:6]]
link = partial(erase, forget=FORGET, retain=[*RETAIN, *OTHERWISE, FORGET[0]])


@pytest.mark.filterwarnings("ignore:1 retain pair is also", "ignore:retain", "ignore:verdict")
def test_pictures_stay_what_they_are_and_keep_their_other_captions():
    model = knowing_model()
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    result = link(model, erase="link", lr=1e-2)
    changed = {
        n for n, each in model.module.state_dict().items() if not torch.equal(each, before[n])
    }
    assert changed
    assert not any(name.startswith("image") for name in changed)
    assert len(result.removed_from_retain) == 1, "a pair that is to be forgotten"
    assert result.config.tune == "text"


@pytest.mark.filterwarnings("ignore:7 retain pairs are also", "ignore:verdict")
def test_of_a_concept_no_picture_is_kept():
    assert len(link(knowing_model()).removed_from_retain) == len(OTHERWISE) + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 retain pair is also", "ignore:retain", "ignore:verdict")
def test_the_verdict_does_not_ask_the_tower_that_is_to_stay(monkeypatch):
    withheld = []
    monkeypatch.setattr(job_module, "choose_withheld", lambda *found: withheld.append(found))
    asked = {}

    def forget_words(*_, **options):
        asked.update(options)

    monkeypatch.setattr(run_module, "forget_words", forget_words)
    result = link(knowing_model(), erase="link", evaluation="quick", **AUTOMATIC)
    assert result.verdict == "forgotten"
    assert not withheld, "no link shows in another"
    assert asked["named_alone"], "words are taken only by name"
    scores = result.evaluation.scores["forget"]
    assert "text_tower_hit@1" in scores
    assert "image_tower_hit@1" not in scores
    assert list(result.traces["forget"].towers) == ["text"]


def test_what_is_trained_is_the_text_tower():
    assert UnlearnConfig(erase="link").tune == "text"
    for tune in ("image", "projections", "last:1", "lora:4"):
        with pytest.raises(
            InputError, match=r"tune='.*' must be 'text' or 'all' with erase='link'"
        ):
            UnlearnConfig(erase="link", tune=tune)
    again = UnlearnConfig(**UnlearnConfig(erase="link").to_dict())
    assert (again.erase, again.tune) == ("link", "text")


def test_a_record_of_links_names_no_pictures():
    """So a later erasure may keep them with other captions."""
    forget = open_pairs(FORGET, name="forget")
    retain = open_pairs([*RETAIN, *OTHERWISE, FORGET[0]], name="retain")
    of_link, of_concept = remember(forget, links=True), remember(forget)
    assert "images" not in of_link
    assert is_same(forget, of_link)
    assert not is_same(retain, of_link)
    with pytest.warns(UserWarning, match="left out of retain"):
        assert len(drop_erased(retain, [{"erased": of_link}])[0]) == len(retain) - 1
    with pytest.warns(UserWarning, match="left out of retain"):
        assert len(drop_erased(retain, [{"erased": of_concept}])[0]) == len(RETAIN)


def test_margins_are_those_of_made_up_names_where_these_are_high():
    high, usual = Band((0.75, 0.81), (0.73, 0.78)), Band((0.57, 0.7), (0.51, 0.65))
    found = Trace(0.79, 0.76, 0.0, 0.0, 0.1, 0.05, 50, band=high)
    lowered = found.strictly(keep=()).lowered
    assert all(0 < MARGIN_RESIDUE - each < 0.05 for each in lowered)
    assert not found.strictly(keep=()).is_remembered
    as_usual = Trace(0.79, 0.76, 0.0, 0.0, 0.1, 0.05, 50, band=usual).strictly(keep=())
    assert as_usual.lowered == (0.79, 0.76)
    assert as_usual.is_remembered
    assert Trace(0.95, 0.76, 0.0, 0.0, 0.1, 0.05, 50, band=high).strictly(keep=()).is_remembered
