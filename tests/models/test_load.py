"""Strings, folders and instances that load, and those that must be refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fasterase.errors import InputError, MissingExtraError
from fasterase.models import load_model
from tests import small_models
from tests.models.conftest import Malicious, batch_for, build_model


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "open_clip"
    build_model("open_clip_vit").save(folder)
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "hf"
    build_model("hf_clip").save(folder)
    return folder


def test_folders_load_as_str_path_and_local_dir(open_clip_folder, hf_folder):
    expected = build_model("open_clip_vit")
    pixels, _ = batch_for(expected)
    for form in (open_clip_folder, str(open_clip_folder), f"local-dir:{open_clip_folder}"):
        assert torch.equal(load_model(form).encode_image(pixels), expected.encode_image(pixels))
    for form in (hf_folder, str(hf_folder), f"hf:{hf_folder}"):
        model = load_model(form)
        assert type(model.module).__name__ == "CLIPModel"
        assert model.tokenize(["a cat"]).ids.shape == (1, 16)
        assert model.image_transform is not None


def test_loading_and_saving_write_no_bars_and_leave_the_library_its_own(hf_folder, tmp_path, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    load_model(hf_folder).save(tmp_path / "again")
    assert "\r" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()


def test_a_dual_encoder_is_returned_unchanged():
    model = build_model("hf_clip")
    assert load_model(model) is model


def test_an_hf_instance_finds_its_tokenizer_where_it_came_from(hf_folder):
    from transformers import CLIPModel

    model = load_model(CLIPModel.from_pretrained(hf_folder))
    assert None not in (model.text_tokenizer, model.image_transform)


def test_named_open_clip_instances_are_recognised():
    import open_clip

    with torch.device("meta"):
        module = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32-alt"))
    model = load_model(module)
    assert model.name == "ViT-S-32-alt"
    assert model.tokenize(["a cat"]).ids.shape == (1, 77)
    assert model.config == open_clip.get_model_config("ViT-S-32-alt")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2), "Linear is not a supported CLIP"),
        (AveragedModel(nn.Linear(2, 2)), "wraps a Linear; pass the model inside"),
        (nn.DataParallel(nn.Linear(2, 2)), "Linear is not a supported CLIP"),
        (3, "int is not a model"),
        (None, "NoneType is not a model"),
        ("nonsense", "neither an open_clip model nor a folder"),
        ("", "neither an open_clip model nor a folder"),
        ("openai/clip-vit-base-patch32", "Did you mean hf:openai/clip-vit-base-patch32 "),
        ("ViT-B32", "Did you mean .*ViT-B-32"),
        ("ViT-B-32", "Its tags: .*laion2b_s34b_b79k"),
        ("ViT-B-32/", "Its tags: .*laion2b_s34b_b79k"),
        ("ViT-B-32/laion2b_s34b", "close: .*laion2b_s34b_b79k"),
        ("ViT-S-32-alt/openai", "has no weights"),
        ("./no/such/folder", "does not exist"),
        ("weights.safetensors", "does not exist"),
        (Path("no/such/folder"), "does not exist"),
        ("local-dir:no/such/folder", "does not exist"),
        (Path(__file__), "is a file"),
    ],
)
def test_unusable_models_are_named(model, says):
    with pytest.raises(InputError, match=rf"(?s)^model: .*{says}"):
        load_model(model)


@pytest.mark.parametrize(
    "model", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:no-org/no-model", "hf:no-org/no-model"]
)
def test_without_network_there_are_no_random_weights(model, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"(?s)^model: .*could not load.*network"):
        load_model(model)


def test_folders_without_weights_or_config(open_clip_folder, hf_folder, tmp_path):
    for source, weights in (
        (open_clip_folder, "open_clip_model.safetensors"),
        (hf_folder, "model.safetensors"),
    ):
        folder = shutil.copytree(source, tmp_path / source.name)
        (folder / weights).unlink()
        with pytest.raises(InputError, match=r"^model: .*could not load"):
            load_model(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="not a model folder"):
        load_model(empty)


def test_missing_weights_are_not_made_up(hf_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of .*visual_projection\.weight"):
        load_model(folder)


def test_damaged_open_clip_folders(open_clip_folder, tmp_path):
    folder = shutil.copytree(open_clip_folder, tmp_path / "damaged")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 3
    for content in (json.dumps(config), "{"):
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(InputError, match=r"^model: .*could not load"):
            load_model(folder)


def test_no_folder_is_unpickled(open_clip_folder, hf_folder, tmp_path):
    trace = tmp_path / "trace"
    for source, name in (
        (open_clip_folder, "open_clip_pytorch_model.bin"),
        (hf_folder, "pytorch_model.bin"),
    ):
        folder = shutil.copytree(source, tmp_path / source.name)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        torch.save({"logit_scale": Malicious(trace)}, folder / name)
        with pytest.raises(InputError, match=r"^model: .*could not load"):
            load_model(folder)
        (folder / name).write_bytes(pickle.dumps(Malicious(trace)))
        with pytest.raises(InputError, match=r"^model: .*could not load"):
            load_model(folder)
    assert not trace.exists()


def test_tensors_in_a_bin_file_do_load(open_clip_folder, tmp_path):
    from safetensors.torch import load_file

    folder = shutil.copytree(open_clip_folder, tmp_path / "bin")
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    assert load_model(folder).fingerprint() == load_model(open_clip_folder).fingerprint()


def test_another_transformers_model_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'bert' model; .*CLIPModel"):
        load_model(tmp_path)


def test_without_transformers_the_extra_is_named(hf_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"fasterase\[hf\]"):
        load_model(hf_folder)


@pytest.mark.parametrize(
    ("model", "model_name", "says"),
    [
        (small_models.open_clip_vit(), "ViT-B-32", "do not have the shapes"),
        (small_models.open_clip_vit(), "ViT-Z", "open_clip knows no"),
        (small_models.hf_clip(), "ViT-B-32", "transformers"),
        ("ViT-B-32/openai", "ViT-B-32", "already says"),
    ],
)
def test_model_name_must_fit(model, model_name, says):
    with pytest.raises(InputError, match=f"model_name: .*{says}"):
        load_model(model, model_name=model_name)


def test_openai_tags_run_with_their_own_activation(monkeypatch):
    import open_clip

    asked: dict[str, object] = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        raise RuntimeError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(InputError, match="stop here"):
            load_model(f"ViT-B-32/{tag}")
        assert asked["force_quick_gelu"] is quick
        assert asked["require_pretrained"] is True
        assert asked["weights_only"] is True
