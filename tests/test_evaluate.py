from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import fasterase
from fasterase.encode import PairEncoder
from fasterase.engine.model_state import placed
from fasterase.errors import InputError
from tests import small_models
from tests.evaluation.lookup_model import LookupModel, picture
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model
from tests.tiny_model import unchanged

TEXTS = ["cat", "dog", "hen", "owl", "a photo of a cat.", "a photo of a dog."]
FORGET, RETAIN = [(picture(0), "cat")], [(picture(1), "dog"), (picture(2), "hen")]


def lookup_model(noise: float = 0.0) -> LookupModel:
    torch.manual_seed(0)
    image = torch.eye(4) + noise * torch.randn(4, 4)
    text = torch.eye(4)[[0, 1, 2, 3, 0, 1]]  # the class prompts are like their classes
    return LookupModel(image, text, TEXTS, "fake")


def test_the_signature_is_as_promised() -> None:
    parameters = inspect.signature(fasterase.evaluate).parameters
    by_position = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["model", "forget", "retain"]
    defaults = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert " ".join(defaults) == (
        "sets forget_sets holdout original references class_names templates tasks attacks "
        "non_members max_pairs seed tokenizer preprocess model_name image_key text_key device "
        "num_workers progress"
    )
    assert (defaults["attacks"], defaults["max_pairs"], defaults["seed"]) == ((), 5000, 0)
    assert not any(defaults[name] for name in ("sets", "forget_sets", "references"))


def test_all_sets_and_models_are_measured() -> None:
    found = fasterase.evaluate(
        lookup_model(),
        FORGET,
        RETAIN,
        holdout=[(picture(3), "owl")],
        sets={"neighbour": RETAIN[:1]},
        forget_sets={"forget-unseen": FORGET},
        original=lookup_model(0.5),
        references={"other": lookup_model(3)},
        class_names=["cat", "dog"],
    )
    names = ["forget", "forget-unseen", "retain", "holdout", "neighbour"]
    assert list(found.to_dict()) == names
    assert found.original is not None
    assert list(found.original) == list(found.references["other"]) == names
    assert found.pairs == {name: 2 if name == "retain" else 1 for name in names}
    assert found.to_dict()["holdout"]["image_to_text_recall@1"] == 1
    assert found.to_dict()["forget"]["zero_shot_accuracy"] == 1
    assert found.original["retain"]["matched_cosine"] < 1
    with pytest.raises(InputError, match=r"plot: there is nothing to draw"):
        found.plot("nowhere")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_attacks_that_train_do_so_in_any_mode_of_the_caller(mode: Any) -> None:
    forget, retain = concept_pairs([FORGOTTEN], 4, seed=1), concept_pairs(KEPT, 4, seed=2)
    model = knowing_model()
    with mode():
        found = fasterase.evaluate(model, forget, retain, attacks=["relearn"])
    assert found.attacks["relearn"]


def test_a_model_of_a_library_is_measured_and_left_as_it_was() -> None:
    model = small_models.open_clip_vit()
    vocabulary = small_models.SIMPLE_VOCABULARY_SIZE
    forget, retain = (
        list(zip(*small_models.random_pairs(vocabulary, count=n, seed=n), strict=True))
        for n in (3, 6)
    )
    with unchanged(model):
        found = fasterase.evaluate(model, forget, retain, original=model, max_pairs=5)
    assert found.pairs == {"forget": 3, "retain": 5}
    assert found.original == found.to_dict()
    pixels, ids = map(torch.stack, zip(*forget, strict=True))
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(ids, normalize=True)
    assert found.to_dict()["forget"]["matched_cosine"] == pytest.approx(
        float((image * text).sum(1).mean()), abs=1e-5
    )


def test_strings_go_through_the_given_tokenizer_and_pictures_through_preprocess() -> None:
    size = small_models.IMAGE_SIZE
    pictures = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    forget, *retain = zip(pictures, ("a cat", "a dog", "a hen", "an owl"), strict=True)
    options = {"class_names": ["cat", "dog", "hen"], "tokenizer": small_models.simple_tokenizer()}
    found = fasterase.evaluate(small_models.open_clip_vit(), [forget], retain, **options)
    assert 0 <= found.to_dict()["retain"]["zero_shot_accuracy"] <= 1


def test_workers_progress_and_device_reach_the_encoder(monkeypatch, capsys) -> None:
    made = []

    def encoder(model: Any, **options: Any) -> PairEncoder:
        made.append((options["num_workers"], options["progress"], str(model.device)))
        return PairEncoder(model, **options)

    monkeypatch.setattr("fasterase.api.PairEncoder", encoder)
    fasterase.evaluate(lookup_model(), FORGET, RETAIN, device="cpu", num_workers=1, progress=False)
    assert made[0] == (1, False, "cpu")
    assert capsys.readouterr().err == ""
    fasterase.evaluate(lookup_model(), FORGET, RETAIN)
    assert "measured: model, on" in capsys.readouterr().err


def test_a_model_is_moved_for_the_measurement_and_back() -> None:
    moves: list[object] = []
    module = SimpleNamespace(to=moves.append)
    model = cast(Any, SimpleNamespace(device=torch.device("cpu"), module=module))
    with placed(model, device=torch.device("cuda:1")):
        assert moves == [torch.device("cuda:1")]
    assert moves == [torch.device("cuda:1"), torch.device("cpu")]
    with placed(model, device=torch.device("cpu")):
        assert len(moves) == 2


def test_broken_pairs_are_named_in_a_warning() -> None:
    broken = [*FORGET, (torch.full((3, 1, 1), torch.nan), "cat")]
    with pytest.warns(UserWarning, match=r"1 broken pair is.*forget\[1\]"):
        found = fasterase.evaluate(lookup_model(), broken, RETAIN, original=lookup_model())
    assert found.pairs["forget"] == 1


def test_a_model_that_is_missing_is_named_before_another_one_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("fasterase.api.PairEncoder", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError, match="model: 'no/folder'"):
        fasterase.evaluate("no/folder", FORGET, RETAIN, original=lookup_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "retrieval"}, "tasks='retrieval': expected a list of names"),
        ({"attacks": ["swop"]}, r"attacks: unknown attack 'swop'. Did you mean swap\?"),
        ({"attacks": "swap"}, "attacks='swap': expected a list"),
        ({"attacks": ["swap"]}, "attacks: 'swap' needs the model before erasing. Pass it as orig"),
        ({"attacks": ["membership"]}, "attacks: 'membership' needs pairs .* Pass them as non_mem"),
        ({"attacks": ["probe"]}, "'probe' needs two .* found 1 to forget and 2 unrelated"),
        ({"attacks": ["relearn"]}, "'relearn' needs two .* found 1 to forget and 2 unrelated"),
        ({"attacks": ["prompt"]}, "'prompt' needs two .* found 1 to forget and 2 unrelated"),
        ({"attacks": ["quantise"]}, "'quantise' rounds the weights .* fake has none"),
        (
            {"attacks": ["membership"], "non_members": FORGET},
            "'membership' needs two non-members or more",
        ),
        (
            {"attacks": ["probe"], "retain": [(picture(2), "cat"), (picture(1), "cat")]},
            "attacks: every caption of `retain` is also one to forget",
        ),
        ({"tasks": ["protypes"]}, r"unknown task 'protypes'. Did you mean prototypes\?"),
        ({"tasks": ["zero_shot"]}, "'zero_shot' needs classes"),
        (
            {"tasks": ["linear_probe"]},
            "'linear_probe' needs two classes with two different images or more, found 0",
        ),
        ({"tasks": ["image_retrieval"]}, "'image_retrieval' needs images with another one"),
        ({"tasks": ["paraphrases"]}, "'paraphrases' measures the second and further captions"),
        (
            {"tasks": ["paraphrases"], "retain": FORGET},
            "'paraphrases': every caption of `retain` is also one to forget",
        ),
        ({"non_members": FORGET}, "non_members: none of the attacks uses them. Add 'membership'"),
        ({"sets": {"forget": FORGET}}, "sets: 'forget' is an argument of its own"),
        ({"sets": {"holdout": FORGET}}, "sets: 'holdout' is an argument of its own"),
        ({"sets": {" ": FORGET}}, "sets: ' ' is not a name"),
        ({"forget_sets": {"retain": FORGET}}, "forget_sets: 'retain' is an argument of its own"),
        (
            {"forget_sets": {"x": FORGET}, "sets": {"x": FORGET}},
            "sets: 'x' is also a set of another",
        ),
        ({"forget_sets": [FORGET]}, "forget_sets must map names to pairs, found list"),
        ({"sets": [FORGET]}, "sets must map names to pairs, found list"),
        ({"sets": {"empty": []}}, "empty"),
        ({"forget": []}, "forget"),
        ({"retain": []}, "`retain` is empty; a verdict needs"),
        ({"holdout": "missing/file.csv"}, "holdout"),
        ({"references": {"original": None}}, "references: 'original' cannot name"),
        ({"references": [1]}, "references must map names to models, found list"),
        ({"max_pairs": 0}, "max_pairs=0"),
        ({"max_pairs": 2.5}, "max_pairs=2.5"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1 must be 0 or more, or 'auto'"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here"),
        ({"class_names": ["cat"]}, "class_names has 1 distinct names"),
        ({"class_names": 3}, "class_names=3"),
        ({"templates": ["a photo"]}, "templates: 'a photo'"),
        ({"forget": [(torch.zeros(3, 2, 2), "cat")]}, r"\[3, 1, 1\]"),
        ({"model": nn.Linear(2, 2)}, "^model: Linear"),
        ({"original": nn.Linear(2, 2)}, "^original: model: Linear"),
        ({"references": {"tuned": "no/folder"}}, r"^references\['tuned'\]: model: 'no/folder'"),
    ],
)
def test_wrong_input_is_named(options: dict[str, Any], message: str) -> None:
    given = {"model": lookup_model(), "forget": FORGET, "retain": RETAIN, **options}
    with pytest.raises(InputError, match=message):
        fasterase.evaluate(**given)
