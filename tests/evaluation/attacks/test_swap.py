"""A swap of towers against a model that is made of those towers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fasterase
from fasterase.errors import InputError
from fasterase.report.evaluation import Evaluation
from tests.evaluation.lookup_model import LookupModel, attack, picture

CAPTIONS = ["cat", "lynx", *(f"thing {i}" for i in range(40))]
FORGET = [(picture(0), "cat"), (picture(1), "lynx")]
RETAIN = [(picture(i), CAPTIONS[i]) for i in range(2, len(CAPTIONS))]
UNSEEN = [(picture(1), "cat"), (picture(0), "lynx")]
WIDTH = 6


def model(seed: int, *, width: int = WIDTH) -> LookupModel:
    numbers = torch.Generator().manual_seed(seed)
    text = torch.randn(len(CAPTIONS), width, generator=numbers)
    image = text + 0.8 * torch.randn(len(CAPTIONS), width, generator=numbers)
    return LookupModel(image, text, CAPTIONS, "fake")


def joined(image: LookupModel, text: LookupModel) -> LookupModel:
    return LookupModel(
        image.module.image.detach(), text.module.text.detach(), CAPTIONS, "made of two"
    )


def test_figures_are_those_of_a_model_made_of_both_towers(tmp_path: Path) -> None:
    original, erased, retrained = model(0), model(1), model(2)
    others = {"retrained": retrained, "narrow": model(3, width=4)}
    sets = {"unseen": UNSEEN}
    given = {"original": original, "references": others, "forget_sets": sets}
    found = attack("swap", erased, FORGET, RETAIN, **given)
    figures = found.attacks["swap"]
    for key, mixed, mixed_reference in (
        ("original_images", joined(original, erased), joined(original, retrained)),
        ("original_texts", joined(erased, original), joined(retrained, original)),
    ):
        of_model, of_reference = (
            fasterase.evaluate(each, FORGET, RETAIN, forget_sets=sets, progress=False).to_dict()
            for each in (mixed, mixed_reference)
        )
        assert found.original is not None
        for name in ("forget", "unseen"):
            for metric in ("image_to_text_residue", "text_to_image_residue", "contest_hit@1"):
                figure = figures[f"{name}/{key}/{metric}"]
                assert figure.value == pytest.approx(of_model[name][metric])
                assert figure.references == pytest.approx({"retrained": of_reference[name][metric]})
                assert figure.original == pytest.approx(found.original[name][metric])
                assert figure.low is not None
                assert figure.low <= figure.value <= figure.high
    assert found.to_dict()["attack:swap"]["seconds"] > 0
    assert "attack swap: forget, the original's images with the model's texts\n" in found.table()
    path = found.report(tmp_path / "report.json")
    assert Evaluation.from_json(path) == found
    stored = json.loads(path.read_text())
    del stored["attacks"]  # as earlier versions wrote it
    path.write_text(json.dumps(stored))
    assert Evaluation.from_json(path).attacks == {}


def test_one_erased_tower_leaves_the_concept_in_the_other() -> None:
    original = LookupModel(torch.eye(42), torch.eye(42), CAPTIONS, "knows all")
    text = torch.eye(42)
    text[:2] *= -1
    erased = LookupModel(torch.eye(42), text, CAPTIONS, "other names for cats")
    figures = attack("swap", erased, FORGET, RETAIN, original=original).attacks["swap"]
    assert figures["forget/original_images/image_to_text_residue"].value == 0
    assert figures["forget/original_texts/image_to_text_residue"].value == 1
    assert figures["forget/original_texts/contest_hit@1"].value == 1
    assert figures["forget/original_texts/contest_hit@1"].low == pytest.approx(0.342, abs=1e-3)


def test_a_model_of_another_width_cannot_be_swapped() -> None:
    with pytest.raises(InputError, match=r"attacks: 'swap' compares .* have 4 numbers .* 6"):
        attack("swap", model(1, width=4), FORGET, RETAIN, original=model(0))
