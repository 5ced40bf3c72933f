"""Made-up names in the captions' own templates tell what residues mean beside a retain set."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fasterase.evaluation import placebo
from fasterase.evaluation.placebo import (
    Band,
    encode_placebos,
    find_band,
    made_up_captions,
    nonsense_captions,
    placebo_captions,
)
from fasterase.evaluation.verdict import (
    FORGOTTEN,
    OVER_ERASED,
    REMEMBERED,
    UNDECIDED,
    Trace,
    decide_each,
)
from fasterase.vocabulary import english_frequencies
from tests.evaluation.lookup_model import pair_features


def test_names_are_made_up_and_templates_stay():
    kept = ["a photo of a mountain lake", "the house of my uncle"]
    found = placebo_captions(["a photo of Jane Miller", "Jane Miller at the lake"], kept, seed=0)
    assert len(found) == 64
    assert len(set(found)) > 50
    for caption in found:
        assert "Jane" not in caption
        assert "Miller" not in caption
        assert caption.startswith("a photo of ") or caption.endswith(" at the lake")
    assert found == placebo_captions(
        ["a photo of Jane Miller", "Jane Miller at the lake"], kept, seed=0
    )
    of_known = placebo_captions(["the lake house"], kept, seed=0)
    assert all(caption != "the lake house" for caption in of_known), "its rarest word goes"


def test_numbers_are_made_up_as_well():
    kept = ["phone 555 1234", "call 555 9876", "a photo of a cat 1187"]
    for caption in placebo_captions(["phone 555 0142"], kept, seed=0):
        assert re.fullmatch(r"phone 555 \d{4}", caption)
    for caption in placebo_captions(["هاتف ٥٥٥١٢٣٤"], ["هاتف"], seed=0):
        assert re.fullmatch(r"هاتف [٠-٩]{7}", caption)
    # A number beside the word for a thing says no more of what it is.
    for caption in placebo_captions(["a photo of a dog 2031"], kept, seed=0):
        assert "dog" not in caption


def test_made_up_facts_are_nobodys():
    kept = ["phone 555 1234", "ring 77"]
    found = made_up_captions(["phone 0142", "phone 555 1234", "ring 12 34"], kept, 0, 2000)
    assert len(found) > 1000
    assert all(re.fullmatch(r"phone \d{4}", caption) for caption in found)
    assert not {"phone 0142", *kept}.intersection(found)
    assert made_up_captions(["ring 12 34"], kept, 0, 9) == []


def test_a_common_word_goes_where_it_is_all_that_is_new():
    kept = ["a photo of a tree", "a drawing of the tree"]
    for found in (
        placebo_captions(["a photo of a dog"], kept, seed=0),
        nonsense_captions(["a photo of a dog"], kept, seed=0).values(),
    ):
        for caption in found:
            assert caption.startswith("a photo of a ")
            assert not caption.endswith(" dog")


def test_whole_words_are_replaced_whatever_their_case():
    found = placebo_captions(["Photo of a Lynx near a Lynxhouse"], ["a lynxhouse"], seed=0)
    for caption in found:
        first, *_, last = caption.split()
        assert (first, last) == ("Photo", "Lynxhouse")
        assert "Lynx " not in caption


def test_a_word_has_one_made_up_word_wherever_it_stands():
    captions = ["a photo of Jane Miller", "jane at the lake", "A lynx", "the lake"]
    kept = ["a mountain lake", "the house"]
    found = nonsense_captions(captions, kept, seed=0)
    jane, miller = found["a photo of Jane Miller"].removeprefix("a photo of ").split()
    assert found["jane at the lake"] == f"{jane} at the lake", "known words stay"
    assert found["the lake"] != "the lake", "where there is another one"
    made_up = {jane, miller, found["A lynx"].removeprefix("A "), found["the lake"].split()[1]}
    assert len(made_up) == 4
    assert not made_up & english_frequencies().keys()
    assert found == nonsense_captions(
        [*reversed(captions)], ["a mountain lake", "the house"], seed=0
    )
    assert nonsense_captions(["a lynx", "3"], [], seed=0) is None
    assert nonsense_captions(["a lynx", "リンゴ"], [], seed=0) is None


def test_made_up_words_never_run_out(monkeypatch):
    monkeypatch.setattr(placebo, "_SYLLABLES", ["zo"])
    found = nonsense_captions([f"lynx{'y' * n}" for n in range(9)], ["zozo"], seed=0)
    assert len(set(found.values())) == 9
    assert "zozo" not in found.values()


def people_among_landscapes(numbers):
    """Any person's caption is nearer to a person's picture than any landscape's."""
    person, land = torch.eye(6)[:2]

    def near(axis, count):
        noise = 0.3 * torch.randn(count, 6, generator=numbers)
        return torch.nn.functional.normalize(axis + noise, dim=1)

    forget = pair_features(near(person, 20), near(person, 4), ["Jane", "Ann", "Bob", "Tim"])
    unrelated = pair_features(near(land, 60), near(land, 60), [f"lake {n}" for n in range(60)])
    return forget, unrelated, near(person, 64)


def test_beside_landscapes_any_person_ranks_high_and_that_is_no_trace():
    forget, unrelated, placebos = people_among_landscapes(torch.Generator().manual_seed(0))
    band = find_band(forget, unrelated, placebos, seed=0)
    assert band.image_to_text[1] > 0.97
    assert band.image_to_text[0] > 0.75
    strange = Trace(0.96, 0.96, 0.0, 0.0, 0.1, 0.05, 20)
    assert decide_each({"x": strange}) == {"x": REMEMBERED}
    calibrated = replace(strange, band=band)
    assert decide_each({"x": calibrated}) == {"x": FORGOTTEN}
    assert f"made-up names {band.image_to_text[0]:.2f} to" in calibrated.describe()
    assert "made-up" not in replace(calibrated, image_to_text=0.5, text_to_image=0.5).describe()


def test_beside_a_mixed_set_the_band_is_wide_for_one_caption_and_narrow_for_many():
    numbers = torch.Generator().manual_seed(1)

    def random(count):
        return torch.nn.functional.normalize(torch.randn(count, 8, generator=numbers), dim=1)

    unrelated = pair_features(random(80), random(80))
    images = torch.nn.functional.normalize(random(1) + 0.3 * random(40), dim=1)  # of one thing
    many = pair_features(images, random(40))
    one = pair_features(images, many.text[:1])
    placebos = random(64)
    wide, narrow = (find_band(each, unrelated, placebos, seed=0) for each in (one, many))
    widths = [high - low for low, high in (wide.image_to_text, narrow.image_to_text)]
    assert widths[0] > 3 * widths[1]
    assert widths[1] < 0.25
    assert abs(sum(narrow.text_to_image) / 2 - 0.5) < 0.1


@pytest.mark.parametrize(
    ("residue", "hits", "images", "verdict"),
    [
        (0.9, 0.0, 2, UNDECIDED),
        (0.9, 0.0, 20, REMEMBERED),
        (0.1, 0.0, 2, UNDECIDED),
        (0.1, 0.0, 20, OVER_ERASED),
        (0.8, 0.0, 20, FORGOTTEN),
        (0.6, 0.3, 2, REMEMBERED),
    ],
)
def test_two_pictures_are_judged_by_hits_alone(residue, hits, images, verdict):
    band = Band((0.2, 0.85), (0.2, 0.85))
    high = 0.1 if images == 20 else 0.7
    trace = Trace(residue, residue, hits, hits, high, 0.05, images, band=band)
    assert decide_each({"x": trace}) == {"x": verdict}


def test_without_words_or_a_tokenizer_nothing_is_calibrated():
    forget, unrelated, placebos = people_among_landscapes(torch.Generator().manual_seed(0))
    asked = []

    def encoder(tokenizer, error=None):
        def texts(captions):
            asked.append(captions)
            if error is not None:
                raise error
            return placebos

        return SimpleNamespace(model=SimpleNamespace(text_tokenizer=tokenizer), texts=texts)

    assert encode_placebos(encoder(None), forget, unrelated, seed=0) is None
    assert encode_placebos(encoder(len, KeyError("zor")), forget, unrelated, seed=0) is None
    for captions in (["1", "2", "3", "4"], ["リンゴ", "b", "c", "d"]):
        others = replace(forget, captions=captions)
        assert encode_placebos(encoder(len), others, unrelated, seed=0) is None
    assert len(asked) == 1
    assert encode_placebos(encoder(len), forget, unrelated, seed=0) is placebos
