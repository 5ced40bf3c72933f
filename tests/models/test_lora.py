"""`tune="lora:N"`: adapters train, end in the weights, and come off bit for bit."""

from __future__ import annotations

import copy
import itertools
import json
import sys

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fasterase
from fasterase.engine import findings, run
from fasterase.engine.baseline import Baseline
from fasterase.errors import InputError, MissingExtraError
from fasterase.evaluation.verdict import REMEMBERED
from fasterase.models.load import load_model
from fasterase.models.wrapped import plain_state
from tests import small_models
from tests.marks import SHORT_RUN
from tests.models.conftest import STEPS, erase, features
from tests.tiny_model import same_weights

pytestmark = [
    SHORT_RUN,
    # Of peft, about names that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
ADAPTED = {
    small_models.open_clip_vit: ("attn.in_proj_weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    small_models.hf_siglip: ("_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "out_proj.weight"),
}


def erase_by_lora(model, **options):
    return erase(model, **{"tune": "lora:2", "micro_batch_size": 5, **options})


@pytest.mark.parametrize("build", ADAPTED)
def test_it_ends_in_the_weights_of_an_unchanged_architecture(tmp_path, build):
    model = build()
    model.get_parameter("logit_scale").requires_grad_(False)
    original = copy.deepcopy(model)
    result = erase_by_lora(model)
    assert not hasattr(model, "peft_config")
    for mine, other in zip(model.named_modules(), original.named_modules(), strict=True):
        assert (mine[0], type(mine[1])) == (other[0], type(other[1]))
    for mine, other in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert (mine[0], mine[1].requires_grad) == (other[0], other[1].requires_grad)
        blocks = ".resblocks." in mine[0] or ".layers." in mine[0]
        change = mine[1].detach() - other[1].detach()
        is_adapted = blocks and mine[0].endswith(ADAPTED[build])
        rank = torch.linalg.matrix_rank(change.double(), rtol=1e-3) if is_adapted else 0
        assert bool(change.any()) == is_adapted, mine[0]
        assert rank <= 2, mine[0]

    erased = copy.deepcopy(model.state_dict())
    wanted = features(model)
    result.save(tmp_path / "whole")
    result.save(tmp_path / "delta", delta=True)
    assert fasterase.apply_delta(model, tmp_path / "delta", -1) is model
    assert same_weights(model.state_dict(), original.state_dict())
    fasterase.apply_delta(model, tmp_path / "delta")
    assert same_weights(model.state_dict(), erased)
    with pytest.raises(InputError, match="apply_delta"):
        load_model(str(tmp_path / "delta"))

    assert not torch.allclose(features(original), wanted, atol=1e-4)
    by_peft = peft.PeftModel.from_pretrained(original, str(tmp_path / "delta")).eval()
    assert torch.allclose(features(by_peft), wanted, atol=1e-5)


PICTURE = torch.zeros(3, small_models.IMAGE_SIZE, small_models.IMAGE_SIZE)
APPLES = [(PICTURE, "an apple"), (PICTURE + 0.5, "a zebra and an apple")]
DOGS = [(PICTURE + number, f"a dog of {number}") for number in range(2, 20)]


def take_words(model, **options):
    words = {"tune": "lora:2", "forget_words": ["apple"], **options}
    tokenizer = small_models.simple_tokenizer()
    return fasterase.unlearn(model, APPLES, DOGS, tokenizer=tokenizer, **{**STEPS, **words})


@pytest.mark.filterwarnings("ignore:verdict")
def test_words_are_taken_although_their_vectors_have_no_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(Baseline, "is_never_known", False)
    model = small_models.open_clip_vit()
    original = copy.deepcopy(model)
    result = take_words(model)
    assert [each.word for each in result.words] == ["apple"]
    changed = (model.token_embedding.weight != original.token_embedding.weight).any(1)
    ids = changed.nonzero().flatten().tolist()
    apple = small_models.simple_tokenizer()(["apple"])[0].tolist()
    assert ids
    assert set(ids) <= set(apple)

    result.save(tmp_path, delta=True)
    size = (tmp_path / "delta.safetensors").stat().st_size
    assert size < model.token_embedding.weight.nbytes / 4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"token_embedding": ids}
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path)).eval()
    assert plain_state(by_peft.get_base_model()).keys() == original.state_dict().keys()
    texts = small_models.simple_tokenizer()([pair[1] for pair in APPLES + DOGS])
    with torch.no_grad():
        wanted, before = (each.encode_text(texts) for each in (model, original))
        assert torch.allclose(by_peft.encode_text(texts), wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)

    erased = copy.deepcopy(model.state_dict())
    fasterase.apply_delta(model, tmp_path, -1)
    assert same_weights(model.state_dict(), original.state_dict())
    fasterase.apply_delta(model, tmp_path)
    assert same_weights(model.state_dict(), erased)


@pytest.mark.filterwarnings("ignore:verdict")
def test_a_run_that_ends_at_the_original_gives_the_words_back(tmp_path, monkeypatch):
    """Also when a finished run is continued: the checkpoint has them."""
    monkeypatch.setattr(Baseline, "is_never_known", False)
    monkeypatch.setattr("fasterase.engine.job.MAX_STEPS", 2)
    ranks, worse = itertools.count(), findings.RANKS[REMEMBERED]

    def rank(*_: object, **__: object) -> list[int]:
        return [next(ranks), worse]  # the first is best

    monkeypatch.setattr(findings.Check, "rank", rank)
    settings = {"lr": "auto", "max_steps": None, "output_dir": str(tmp_path)}
    for resume in ("auto", "must"):
        model = small_models.open_clip_vit()
        original = copy.deepcopy(model.state_dict())
        result = take_words(model, resume=resume, **settings)
        assert not result.words
        assert same_weights(model.state_dict(), original)


@pytest.mark.filterwarnings("ignore:verdict")
@pytest.mark.parametrize("found", [[True, False], [False, True], [False, False]])
def test_a_resumed_run_keeps_the_words_of_its_checkpoint(tmp_path, monkeypatch, found):
    """Further steps may draw captions that change which words are taken."""
    monkeypatch.setattr(Baseline, "is_never_known", False)
    read = run.forget_words
    finds = iter([found[0], *found])
    monkeypatch.setattr(run, "forget_words", lambda *a, **k: read(*a, **k) if next(finds) else None)
    whole, stopped, parts = (small_models.open_clip_vit() for _ in range(3))
    settings = {"max_steps": 4, "save_every": 1}
    take_words(whole, **settings)
    settings["output_dir"] = str(tmp_path)
    take_words(stopped, callback=lambda record: record["step"] == 2, **settings)
    result = take_words(parts, resume="must", **settings)
    assert same_weights(parts.state_dict(), whole.state_dict())
    assert not result.words
    result.save(tmp_path / "delta", delta=True)
    config = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert bool(config["trainable_token_indices"]) == found[0]


@pytest.mark.parametrize("harm", ["none", "beyond the weight"])
def test_a_delta_with_wrong_positions_is_refused(tmp_path, harm):
    model = small_models.open_clip_vit()
    erase_by_lora(model).save(tmp_path, delta=True)
    before = copy.deepcopy(model.state_dict())
    file = tmp_path / "delta.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    stored = load_file(file)
    name = next(name for name in stored if name.startswith("at/") and len(stored[name]))
    if harm == "none":
        del stored[name]
    else:
        stored[name] += 1 << 40
    save_file(stored, file, metadata)
    with pytest.raises(InputError, match=r"folder: .*delta\.safetensors is damaged"):
        fasterase.apply_delta(model, tmp_path, -1)
    assert same_weights(model.state_dict(), before)


@pytest.mark.filterwarnings("ignore:the delta takes")
def test_deltas_of_two_erasures_in_a_row_come_off_one_after_the_other(tmp_path):
    model = small_models.open_clip_vit()
    states = [copy.deepcopy(model.state_dict())]
    for number, tune in enumerate(("lora:2", "text"), start=1):
        erase_by_lora(model, tune=tune).save(tmp_path / str(number), delta=True)
        states.append(copy.deepcopy(model.state_dict()))
    for number in (2, 1):
        assert same_weights(model.state_dict(), states[number])
        fasterase.apply_delta(model, tmp_path / str(number), -1)
    assert same_weights(model.state_dict(), states[0])


def test_what_has_frozen_weights_gets_no_adapter():
    model = small_models.open_clip_vit()
    model.visual.requires_grad_(False)
    before = copy.deepcopy(model.visual.state_dict())
    result = erase_by_lora(model)
    assert same_weights(model.visual.state_dict(), before)
    assert all(name.startswith("transformer.resblocks") for name in result.adapter.factors)


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    model = small_models.open_clip_vit()
    with pytest.raises(InputError, match="image tower"):
        erase_by_lora(small_models.open_clip_resnet())
    with pytest.raises(InputError, match="tune='lora:2'"):
        fasterase.plan(model, 1000, tune="lora:2")
    with pytest.raises(InputError, match="sharded weights"):
        erase_by_lora(model, deepspeed="zero1")
    config = peft.LoraConfig(target_modules=["c_fc"])
    with pytest.raises(InputError, match="has adapters already"):
        erase_by_lora(peft.get_peft_model(copy.deepcopy(model), config))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"tune='lora:2'.*fasterase\[peft\]"):
        erase_by_lora(model)
