"""open_clip weights in a file: loaded by name, recognised by their shapes, or refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fasterase
from fasterase.errors import InputError
from fasterase.models import load_model
from fasterase.models.load import load_architecture
from tests import small_models
from tests.models.conftest import Malicious, batch_for, pairs


@pytest.fixture(autouse=True)
def _architectures(monkeypatch):
    """open_clip knows three small architectures and nothing else."""
    config = small_models.open_clip_config()
    resnet = copy.deepcopy(config)
    resnet["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    deeper = small_models.open_clip_config(layers=3)
    known = {"small": config, "small-resnet": resnet, "small-deeper": deeper}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)


def training_checkpoint(module):
    """What open_clip's training writes, here after data-parallel training."""
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters())
    return {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}


def write(folder, module, name="epoch_3.pt"):
    torch.save(training_checkpoint(module), folder / name)
    return folder / name


@pytest.mark.parametrize("model_name", [None, "small"])
@pytest.mark.parametrize("form", ["training", "state dict", "safetensors"])
def test_files_of_every_form(form, model_name, tmp_path):
    module = small_models.open_clip_vit(seed=3)
    file = tmp_path / "weights.pt"
    if form == "training":
        torch.save(training_checkpoint(module), file)
    elif form == "state dict":
        torch.save(module.state_dict(), file)
    else:
        file = file.with_suffix(".safetensors")
        save_file(module.state_dict(), file)
    model = load_model(str(file), model_name=model_name)
    assert not model.module.training
    assert model.tokenize(["a cat"]).ids.shape == (1, 16)
    pixels, tokens = batch_for(model)
    expected = load_model(module)
    assert torch.equal(model.encode_image(pixels), expected.encode_image(pixels))
    assert torch.equal(model.encode_text(tokens), expected.encode_text(tokens))


def test_erase_from_a_checkpoint_and_save_it(tmp_path):
    module = small_models.open_clip_resnet()
    items, file = pairs(module), write(tmp_path, module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(verdict|retain): ")
        result = fasterase.unlearn(
            file, items[:4], items[4:], max_steps=1, progress=False, evaluation=None
        )
    assert result.encoder.name == "small-resnet (epoch_3.pt)"
    again: Any = open_clip.create_model(f"local-dir:{result.save(tmp_path / 'erased')}")
    assert torch.equal(again.text_projection, result.model.text_projection.cpu())


def test_evaluate_names_the_architecture_of_every_checkpoint(tmp_path, monkeypatch):
    quick = {**small_models.open_clip_config(), "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-quickgelu", quick)
    module = small_models.open_clip_vit()
    items, file = pairs(module), write(tmp_path, module)
    saved = tmp_path / "saved"
    load_model(file, model_name="small-quickgelu").save(saved)

    def measure(model, model_name, **others):
        sets = {"forget": items[:4], "retain": items[4:], "progress": False}
        return fasterase.evaluate(model, **sets, model_name=model_name, **others)

    # Without the name each of the files would be taken for "small", with a warning.
    others = {"original": file, "references": {"file": file, "saved": saved}}
    found = measure(file, "small-quickgelu", **others)
    assert found.settings["model"] == "small-quickgelu (epoch_3.pt)"
    assert found.scores == found.references["file"] == found.references["saved"]
    assert measure(saved, "small-quickgelu", original=file).verdict == found.verdict
    with pytest.raises(InputError, match=r"original: model_name: .*do not fit 'small-deeper'"):
        measure(saved, "small-deeper", original=file)
    with pytest.raises(InputError, match=r"model_name: 'small' is for .*none of the models is one"):
        measure(saved, "small", original=saved)


def test_options_of_the_training_are_seen_in_the_weights(tmp_path):
    module = small_models.open_clip_vit(image_size=48, context_length=10)
    module.logit_bias = nn.Parameter(torch.tensor(-9.0))
    model: Any = load_model(write(tmp_path, module))
    assert model.image_size == (48, 48)
    assert model.context_length == 10
    assert model.module.logit_bias.item() == -9
    custom = write(tmp_path, small_models.open_clip_custom_text(), "custom.pt")
    assert type(load_model(custom).module).__name__ == "CustomTextCLIP"
    assert type(load_model(custom, model_name="small").module).__name__ == "CustomTextCLIP"
    architecture = load_architecture(custom)
    assert type(architecture.module).__name__ == "CustomTextCLIP"
    assert architecture.device.type == "meta"


def test_what_weights_do_not_show_is_a_warning(tmp_path, monkeypatch):
    quick = {**small_models.open_clip_config(), "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-quickgelu", quick)
    file = write(tmp_path, small_models.open_clip_vit())
    with pytest.warns(UserWarning, match="taken for small, .*small-quickgelu.*model_name="):
        assert load_model(file).name.startswith("small (")
    assert load_model(file, model_name="small-quickgelu").config["quick_gelu"]


def test_wrong_names_and_unknown_shapes(tmp_path):
    file = write(tmp_path, small_models.open_clip_vit())
    with pytest.raises(InputError, match=r"(?s)model_name: .*do not fit 'small-deeper'"):
        load_model(file, model_name="small-deeper")
    with pytest.raises(InputError, match="model_name: open_clip knows no 'ViT-Z'"):
        load_model(file, model_name="ViT-Z")
    unknown = write(tmp_path, small_models.open_clip_vit(embed_dim=24), "unknown.pt")
    with pytest.raises(
        InputError, match=r"model: .*unknown\.pt have the shapes of no .*model_name="
    ):
        load_model(unknown)


def test_what_is_not_weights(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": Malicious(tmp_path / "trace")}, file)
    with pytest.raises(InputError, match=r"model: .*cannot be read as weights.*weights_only"):
        load_model(file)
    assert not (tmp_path / "trace").exists()
    for content in (b"", b"not a checkpoint"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"model: .*cannot be read as weights"):
            load_model(file)
    for other in ({}, {"state_dict": {}}, [1, 2], {"epoch": 3}, nn.Linear(2, 2).state_dict()):
        torch.save(other, file)
        with pytest.raises(InputError, match=r"model: .*(cannot be read as|no) weights"):
            load_model(file)
    torch.save(small_models.hf_clip().state_dict(), file)
    with pytest.raises(InputError, match=r"no weights of an open_clip model.*folder"):
        load_model(file)
