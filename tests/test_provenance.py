"""What a saved model says about its erasures, and its audit; one erasure after another."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fasterase
from fasterase.errors import InputError
from fasterase.models.load import load_model
from fasterase.provenance import FILE, erasures, read_record
from tests import small_models
from tests.evaluation.lookup_model import LookupModel, picture
from tests.tiny_concepts import concept_pairs, knowing_model

pytestmark = pytest.mark.filterwarnings("ignore:the delta takes")
SETTINGS: dict[str, Any] = {"lr": 1e-4, "max_steps": 1, "evaluation": None, "progress": False}


def pairs_of(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pixels, ids = small_models.random_pairs(count=12, seed=seed)
    return list(zip(pixels, ids, strict=True))


@pytest.mark.filterwarnings("ignore:verdict")
def test_a_record_is_written_chained_and_audited(tmp_path: Path) -> None:
    tokenizer = small_models.simple_tokenizer()
    first, second, retain = pairs_of(0)[:4], pairs_of(1)[:4], pairs_of(2)
    result = fasterase.unlearn(
        small_models.open_clip_vit(), first, retain, tokenizer=tokenizer, **SETTINGS
    )
    one = result.save(tmp_path / "one")
    record = read_record(one)
    assert record is not None
    assert record["data"]["forget"]["pairs"] == 4
    assert record["config"]["max_steps"] == 1
    assert record["outcome"]["verdict"] == result.verdict
    assert record["libraries"]["torch"] == torch.__version__
    assert record["libraries"]["fasterase"] == fasterase.__version__
    assert record["parent"]["record"] is None
    assert record["parent"]["fingerprint"] != record["fingerprint"]
    card = (one / "README.md").read_text()
    assert card.count("## How it was erased") == 1
    assert "- data: forget (4 pairs), retain (12 pairs)" in card
    open_clip.create_model_and_transforms(f"local-dir:{one}")

    two = fasterase.unlearn(str(one), second, retain, **SETTINGS).save(tmp_path / "two")
    chain = erasures(read_record(two) or {})
    assert chain[0] == record
    assert chain[1]["parent"]["fingerprint"] == record["fingerprint"]
    found = fasterase.evaluate(
        str(two), second, retain, forget_sets={"before": first}, progress=False
    )
    assert found.audit[1] == "weights: as they were saved"
    assert "erasure 1 of" in found.audit[2]
    assert "its pairs are measured here as 'before'; now" in found.audit[2]
    assert "its pairs are measured here as 'forget'; now" in found.audit[3]
    assert len(found.audit) == 4
    assert "Audit:\n- erased 20" in found.table()
    # Of the same folder, the record of the parent is kept.
    again = fasterase.unlearn(str(two), second, retain, **SETTINGS).save(two)
    assert len(erasures(read_record(again) or {})) == 3

    weights = load_file(one / "open_clip_model.safetensors")
    weights["text_projection"][0, 0] += 1
    save_file(weights, one / "open_clip_model.safetensors")
    changed = fasterase.evaluate(str(one), second, retain[:8], progress=False).audit
    assert changed[1] == "weights: CHANGED since they were saved"
    assert changed[2].endswith("its pairs are NOT among the sets measured here")
    assert changed[3].startswith("retain: other pairs than")
    (one / FILE).write_text(json.dumps({"format": 1}))
    with pytest.raises(InputError, match=r"provenance\.json is no record of an erasure"):
        fasterase.evaluate(str(one), second, retain)


def models_in(folder: Path, kind: str) -> Path:
    """Save a model whose library and tokenizer were read from folders in `folder`."""
    from transformers import AutoTokenizer

    small_models.hf_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    size = len(small_models.HF_VOCABULARY)
    options = {} if kind == "open_clip" else {"preprocess": small_models.hf_image_processor()}
    module = small_models.hf_clip() if options else small_models.open_clip_vit(vocab_size=size)
    load_model(module, tokenizer=tokenizer, **options).save(folder / "base")
    return folder / "base"


@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain.* seem to name")
@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_what_is_passed_on_names_no_folder_of_this_machine(kind: str, tmp_path: Path) -> None:
    home = tmp_path / "unmistakable"
    model = models_in(home, kind)
    for name, colours in {"forget": ("red", "pink"), "retain": ("blue", "green", "tan")}.items():
        rows = ["filepath,title"]
        for colour in colours:
            Image.new("RGB", (40, 32), colour).save(home / f"{colour}.png")
            rows.append(f"{home / colour}.png,a {colour} square")
        (home / f"{name}.csv").write_text("\n".join(rows) + "\n")
    pairs = str(home / "forget.csv"), str(home / "retain.csv")
    for step in ("one", "two"):
        folder = home / f"unmistakable-{step}"
        places = {"output_dir": str(folder), "reference_cache": str(home / "cache")}
        result = fasterase.unlearn(str(model), *pairs, **places, **SETTINGS)
        result.save(home / "delta", delta=True)
        model = folder / "model"
        for file in (*model.rglob("*"), *(home / "delta").rglob("*")):
            assert b"unmistakable" not in file.read_bytes(), file
    record = read_record(model)
    assert record is not None
    assert [each["parent"]["name"] for each in erasures(record)] == ["base", "model"]
    found = fasterase.evaluate(str(model), *pairs, progress=False).audit
    assert found[1] == "weights: as they were saved"
    assert "erasure 1 of" in found[2]
    assert "its pairs are measured here as 'forget'" in found[2]
    assert "its pairs are measured here as 'forget'" in found[3]
    assert len(found) == 4


def test_a_model_in_memory_has_no_audit() -> None:
    model = LookupModel(torch.eye(2), torch.eye(2), ["cat", "dog"], "fake")
    found = fasterase.evaluate(model, [(picture(0), "cat")], [(picture(1), "dog")], progress=False)
    assert found.audit == []
    assert "Audit" not in found.table()


@pytest.mark.slow
def test_what_was_erased_first_stays_erased_and_damage_does_not_add_up() -> None:
    model = knowing_model()
    kept = concept_pairs(range(2, 8), 20, seed=1)
    sets = {name: concept_pairs((i,), 20, seed=2) for i, name in enumerate("ab")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in "ab":
            options = {"lr": 1e-3, "max_steps": 120, "backend": "dense"}
            fasterase.unlearn(model, sets[name], kept, **{**SETTINGS, **options})
    options = {"forget_sets": {"a": sets["a"]}, "original": knowing_model(), "progress": False}
    found = fasterase.evaluate(model, sets["b"], kept, **options)
    assert found.set_verdicts["original"] == {"forget": "remembered", "a": "remembered"}
    assert "remembered" not in found.set_verdicts["model"].values()
    before, after = (
        each["retain"]["image_to_text_recall@10"] for each in (found.original, found.scores)
    )
    assert after > before - 0.03
