"""Saved folders, read back by the libraries themselves and by `load_model`."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fasterase.errors import InputError
from fasterase.models import load_model
from tests import small_models
from tests.models.conftest import BUILDERS, batch_for, build_model


def safetensors_in(folder):
    return sorted(path.name for path in folder.glob("**/*.safetensors"))


def nudged(model):
    """Change all weights, so that a loader cannot pass by rebuilding the model."""
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.01)
    return model


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind.startswith("open_clip")])
def test_open_clip_reads_it_as_local_dir(kind, tmp_path):
    model = nudged(build_model(kind))
    pixels, tokens = batch_for(model)
    model.save(tmp_path / "erased")
    assert safetensors_in(tmp_path) == ["open_clip_model.safetensors"]

    module, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/erased")
    module.eval()
    image = module.encode_image(pixels, normalize=True)
    text = module.encode_text(tokens.ids, normalize=True)
    torch.testing.assert_close(image, model.encode_image(pixels), rtol=0, atol=1e-6)
    torch.testing.assert_close(text, model.encode_text(tokens), rtol=0, atol=1e-6)
    assert module.logit_scale.detach().exp().item() == pytest.approx(model.scale().item())
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    assert torch.equal(preprocess(picture), model.preprocess(picture))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}/erased")
    assert torch.equal(tokenizer(["a cat"]), model.tokenize(["a cat"]).ids)


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind.startswith("hf")])
def test_transformers_reads_it_with_from_pretrained(kind, tmp_path):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = nudged(build_model(kind))
    model.save(tmp_path / "erased")
    assert safetensors_in(tmp_path) == ["model.safetensors"]
    module = AutoModel.from_pretrained(tmp_path / "erased")
    assert type(module) is type(model.module)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    processor = AutoImageProcessor.from_pretrained(tmp_path / "erased")
    assert list(processor.image_mean) == list(model.image_processor.image_mean)
    if kind == "hf_clip":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "erased")
        ids = tokenizer(["a cat"], padding="max_length", max_length=16)["input_ids"]
        assert ids == model.tokenize(["a cat"]).ids.tolist()


def test_own_folders_come_back_whole(kind, tmp_path):
    model = nudged(build_model(kind))
    pixels, tokens = batch_for(model)
    model.save(tmp_path / "erased")
    again = load_model(tmp_path / "erased")
    assert type(again) is type(model)
    assert not again.module.training
    assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    if kind != "hf_siglip2":  # transformers puts its own tokenizer class around a saved one there
        assert again.fingerprint() == model.fingerprint()
    again.save(tmp_path / "twice")
    for name in ("open_clip_config.json", "preprocessor_config.json"):
        first, second = tmp_path / "erased" / name, tmp_path / "twice" / name
        assert first.exists() == second.exists()
        if first.exists():
            assert json.loads(first.read_text()) == json.loads(second.read_text())


def test_temperature_is_written_0d_and_tied_weights_twice(tmp_path):
    module: Any = small_models.open_clip_custom_text(siglip=True)
    blocks = module.visual.transformer.resblocks
    blocks[1].ln_1.weight = blocks[0].ln_1.weight
    module.logit_scale = nn.Parameter(module.logit_scale.detach().reshape(1))
    module.logit_bias = nn.Parameter(module.logit_bias.detach().reshape(1))
    model = load_model(module)
    assert model.scale().ndim == 0
    model.save(tmp_path / "erased")
    state = load_file(tmp_path / "erased" / "open_clip_model.safetensors")
    assert state["logit_scale"].ndim == 0
    assert state["logit_bias"].ndim == 0
    open_clip.create_model(f"local-dir:{tmp_path}/erased", require_pretrained=True)


def test_hf_tokenizer_of_an_open_clip_folder_is_kept(tmp_path):
    vocabulary = len(small_models.HF_VOCABULARY)
    source = tmp_path / "source"
    model = load_model(
        small_models.open_clip_custom_text(vocab_size=vocabulary),
        tokenizer=small_models.hf_tokenizer(),
    )
    model.save(source)
    expected = model.tokenize(["a red cat"]).ids
    loaded = load_model(source)
    assert torch.equal(loaded.tokenize(["a red cat"]).ids, expected)
    loaded.save(tmp_path / "again")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}/again")
    assert torch.equal(tokenizer(["a red cat"]), expected)
    assert load_model(tmp_path / "again").fingerprint() == loaded.fingerprint()


def test_the_fallback_tokenizer_is_not_taken_for_another_vocabulary(tmp_path):
    load_model(small_models.open_clip_vit(vocab_size=500)).save(tmp_path / "erased")
    assert load_model(tmp_path / "erased").text_tokenizer is None


TIMM_CONFIG = {
    **small_models.open_clip_config(),
    "vision_cfg": {"timm_model_name": "test_vit", "image_size": 160},
}


def test_unknown_architecture_saves_weights_and_says_how(tmp_path):
    module = open_clip.CustomTextCLIP(**TIMM_CONFIG).eval()
    model = load_model(module)
    model.save(tmp_path / "erased")
    folder = tmp_path / "erased"
    assert not (folder / "open_clip_config.json").exists()
    assert "load_file" in (folder / "README.md").read_text()
    state = load_file(folder / "open_clip_model.safetensors")
    assert state.keys() == module.state_dict().keys()
    with pytest.raises(InputError, match=r"model: .*README\.md"):
        load_model(folder)


def test_model_name_makes_an_unknown_architecture_loadable(tmp_path, monkeypatch):
    config = {**TIMM_CONFIG, "custom_text": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-timm", config)
    module = open_clip.CustomTextCLIP(**TIMM_CONFIG).eval()
    for model in (load_model(module, model_name="tiny-timm"), load_model(module)):
        assert model.name == "tiny-timm"
        assert model.text_tokenizer is not None
        model.save(tmp_path / "erased")
        read = open_clip.create_model(f"local-dir:{tmp_path}/erased", require_pretrained=True)
        assert torch.equal(read.visual.head.proj.weight, module.visual.head.proj.weight)


def test_saving_again_replaces_only_what_fasterase_wrote(tmp_path):
    model = build_model("open_clip_vit")
    target = tmp_path / "deep" / "erased"
    model.save(target)
    (target / "stale").write_text("x")
    model.save(str(target))
    assert not (target / "stale").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    model.save(empty)
    assert (empty / "open_clip_config.json").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="folder"):
        model.save(foreign)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="is a file"):
        model.save(foreign / "thesis.tex")


def test_saved_half_precision_is_read_back_as_fp32(tmp_path):
    model = build_model("hf_clip")
    model.module.half()
    model.save(tmp_path / "half")
    again = load_model(tmp_path / "half")
    assert {parameter.dtype for parameter in again.module.parameters()} == {torch.float32}
    pixels, _ = batch_for(again)
    features = F.normalize(again.module.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(again.encode_image(pixels), features)
