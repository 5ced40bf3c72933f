"""The model card: what the hub reads of it, and what it must not tell."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import fasterase
from fasterase.card import _repository, read_base
from fasterase.models.load import load_model
from tests import small_models

pytestmark = pytest.mark.filterwarnings("ignore:the delta takes")


def erase(model, **options):
    """Forget apples; some names are long enough to be found in a card."""
    forget = [(Image.new("RGB", (40, 30), (200, i, 9)), f"crabapple {i}") for i in range(4)]
    retain = [(Image.new("RGB", (40, 30), (9, i, 200)), f"lifeboat {i}") for i in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fasterase.unlearn(
            model,
            forget,
            retain,
            tokenizer=small_models.simple_tokenizer(),
            forget_sets={"Granny Smith": forget[:2]},
            max_steps=1,
            progress=False,
            forget_words=["crabapple"],
            **options,
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model in a folder of this machine, whose card names its licence and its own base."""
    folder = tmp_path_factory.mktemp("unmistakable") / "base"
    load_model(small_models.open_clip_vit(), tokenizer=small_models.simple_tokenizer()).save(folder)
    card = "---\nlicense: mit\nbase_model: org/first\n---\n# base\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def unnamed(base):
    return erase(str(base))


def test_the_hub_reads_metadata_with_the_measurement(unnamed, tmp_path):
    card = ModelCard.load(unnamed.save(tmp_path / "model") / "README.md")
    data = card.data
    assert (data.library_name, data.license, data.base_model) == ("open_clip", "mit", "org/first")
    assert data.base_model_relation == "finetune"
    assert {"fasterase", "machine-unlearning"} <= set(data.tags)
    # Parsed from `model-index`, of which the hub takes no other form.
    results = {(each.dataset_type, each.metric_type): each for each in data.eval_results}
    recall = unnamed.evaluation.scores["retain"]["image_to_text_recall@1"]
    assert results["retain", "image_to_text_recall@1"].metric_value == round(recall, 4)
    assert results["forget", "contest_hit@1"].dataset_name == "forget (4 pairs, to forget)"
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    for heading in ("Verdict", "Damage", "How it was erased", "Limits", "Load it"):
        assert card.text.count(f"## {heading}\n") == 1
    record = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert record["data"]["forget"]["digest"] in card.text


def test_a_card_need_not_tell_what_was_removed_nor_where(base, unnamed, tmp_path):
    named = erase(str(base), concept="ap|ples", output_dir=tmp_path / "unmistakable")
    folders = [unnamed.save(tmp_path / "model"), unnamed.save(tmp_path / "delta", delta=True)]
    for text in (Path(folder, "README.md").read_text(encoding="utf-8") for folder in folders):
        assert "What was erased: not stated." in text
        assert "further set 1" in text
        for secret in ("apple", "boat", "Granny", "unmistakable", str(tmp_path)):
            assert secret not in text
    assert "apply_delta" in text
    text = (tmp_path / "unmistakable" / "model" / "README.md").read_text(encoding="utf-8")
    assert "What was erased: ap\\|ples." in text
    assert "Granny Smith" in text
    assert str(tmp_path) not in text
    assert "unmistakable" not in text
    assert "crabapple" not in text.partition("## Limits")[0], "not the words that were taken either"
    assert named.concept == "ap|ples"


def test_names_of_several_concepts_say_what_was_erased(base, tmp_path):
    pictures = [Image.new("RGB", (40, 30), (200, i, 9)) for i in range(4)]
    forget = {"alice": [(pictures[0], "one")], "bob": [(pictures[1], "two")]}
    retain = [(picture, "kept") for picture in pictures[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fasterase.unlearn(str(base), forget, retain, max_steps=1, progress=False)
    card = (result.save(tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    assert "What was erased: alice, bob." in card
    record = (result.report(tmp_path / "report.md")).read_text(encoding="utf-8")
    assert "alice: 1 pair, to forget, training draws from it" in record
    assert set(result.verdicts) == set(result.traces)


def test_a_folder_of_transformers_is_a_folder_by_either_name(tmp_path):
    folder = tmp_path / "secret" / "clip"
    small_models.hf_clip().save_pretrained(folder)
    for name in (str(folder), f"hf:{folder}"):
        encoder = load_model(name)
        assert (encoder.name, encoder.public_name) == (str(folder), "clip")
    assert read_base("hf:./no/such/folder") == {}


def test_without_a_card_the_model_and_its_record_remain(unnamed, tmp_path):
    folder = unnamed.save(tmp_path / "model", card=False)
    assert not (folder / "README.md").exists()
    assert (folder / "provenance.json").is_file()
    assert load_model(str(folder)).library == "open_clip"


def test_the_base_is_named_as_the_hub_knows_it(tmp_path, monkeypatch):
    assert _repository("hf:org/name") == _repository("hf-hub:org/name@main") == "org/name"
    assert _repository("ViT-B-32/laion2b_s34b_b79k") == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert _repository("CLIP") is None
    (tmp_path / "cached.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    known = {("org/name", "README.md"): str(tmp_path / "cached.md")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *key: known.get(key))
    assert read_base("hf:org/name") == {"base_model": "org/name", "license": "apache-2.0"}
    assert read_base("hf:org/other") == {"base_model": "org/other"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert read_base(str(tmp_path)) == {}, "no model"
    (tmp_path / "model.safetensors").touch()
    assert read_base(str(tmp_path)) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert read_base(str(tmp_path)) == {}, "damaged"
