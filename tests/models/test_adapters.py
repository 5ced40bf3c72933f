"""Models with peft adapters: only the adapters train, and peft itself reads what is saved."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch

from fasterase.errors import InputError, MissingExtraError
from fasterase.models import load_model
from tests import small_models
from tests.marks import SHORT_RUN
from tests.models.conftest import erase, features

pytestmark = [
    SHORT_RUN,
    # Of peft, about names that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def lora(**options):
    return peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj", "c_fc"], **options})


def injected(base):
    return peft.inject_adapter_in_model(lora(), base)


def wrapped(base):
    return peft.get_peft_model(base, lora())


@pytest.mark.parametrize("build", [small_models.hf_clip, small_models.open_clip_vit])
@pytest.mark.parametrize("adapt", [wrapped, injected])
def test_only_adapters_train_and_peft_reads_them(build, adapt, tmp_path):
    base = build()
    given = adapt(copy.deepcopy(base))
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    original = features(given)

    result = erase(given)
    assert result.model is given
    after = given.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".lora_" in name for name in changed)
    erased = features(given)
    assert not torch.allclose(erased, original, atol=1e-3)

    folder = result.save(tmp_path / "erased")
    assert [path.name for path in folder.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    torch.testing.assert_close(features(again), erased)


def test_an_adapter_of_transformers_own(tmp_path, monkeypatch):
    import transformers.integrations.peft as integration

    # The newest transformers may ask for a peft that is not released yet.
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)
    base: Any = small_models.hf_clip()
    given = copy.deepcopy(base)
    given.add_adapter(lora())
    result = erase(given)
    folder = result.save(tmp_path / "erased")
    base.load_adapter(str(folder))
    expected = features(given)
    torch.testing.assert_close(features(base), expected)


def test_an_adapter_of_any_name_and_modules_to_save(tmp_path):
    base = small_models.hf_clip()
    config = lora(modules_to_save=["visual_projection"])
    given = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="mine")
    given.add_adapter("other", lora())
    result = erase(given, copy=True)
    assert isinstance(result.model, peft.PeftModel)
    assert result.model is not given
    folder = result.save(tmp_path / "erased")
    assert (folder / "other" / "adapter_config.json").is_file()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    expected = features(result.model)
    torch.testing.assert_close(features(again), expected)
    assert not torch.allclose(features(given), expected, atol=1e-3)


def test_a_saved_adapter_is_a_model_if_it_names_its_base(tmp_path):
    from transformers import CLIPModel

    load_model(
        small_models.hf_clip(),
        tokenizer=small_models.hf_tokenizer(),
        preprocess=small_models.hf_image_processor(),
    ).save(tmp_path / "before" / "base")
    given = peft.get_peft_model(CLIPModel.from_pretrained(tmp_path / "before" / "base"), lora())
    result = erase(given)
    result.save(tmp_path / "before" / "erased")
    folder = (tmp_path / "before").rename(tmp_path / "after") / "erased"
    assert "before" not in (folder / "adapter_config.json").read_text()
    model = load_model(folder)
    assert isinstance(model.given, peft.PeftModel)
    assert model.text_tokenizer is not None
    torch.testing.assert_close(features(model), features(given))
    assert erase(model.given).model is model.given  # it can be trained further

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(InputError, match=r"model: .* does not say for which.*from_pretrained"):
        load_model(folder)


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    load_model(small_models.hf_clip()).save(tmp_path / "base")
    config = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"fasterase\[peft\]"):
        load_model(tmp_path / "adapter")


def test_weights_beside_the_adapters_are_not_lost_in_silence(tmp_path):
    given = wrapped(small_models.hf_clip())
    given.get_parameter("base_model.model.visual_projection.weight").requires_grad_(True)
    result = erase(given)
    with pytest.warns(
        UserWarning, match=r"1 trained weight outside .*visual_projection.*modules_to_save"
    ):
        result.save(tmp_path / "erased")


def test_adapters_that_would_train_in_vain_are_refused():
    given: Any = wrapped(small_models.hf_clip())
    given.merge_adapter()
    with pytest.raises(InputError, match=r"merged .*unmerge_adapter\(\)"):
        erase(given)
    given.unmerge_adapter()
    given.base_model.disable_adapter_layers()
    with pytest.raises(InputError, match=r"disabled.*Enable"):
        erase(given)


def test_a_prompt_is_not_an_adapter():
    config = peft.PromptTuningConfig(
        num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=2
    )
    base: Any = small_models.hf_clip()
    base.prepare_inputs_for_generation = None
    given = peft.PeftModel(base, config)
    with pytest.raises(InputError, match=r"model: this PeftModel learns a prompt"):
        load_model(given)


def test_open_clip_still_knows_the_architecture_under_adapters():
    import open_clip

    with torch.device("meta"):
        module = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32-alt"))
        given = peft.get_peft_model(module, lora(target_modules=["c_fc", "c_proj"]))
    model = load_model(given)
    assert model.name == "ViT-S-32-alt"
    assert model.text_tokenizer is not None
