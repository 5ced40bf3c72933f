"""What is uploaded to the hub, and when nothing is."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest.mock import Mock

import open_clip
import pytest
import transformers
import yaml

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.models.load import load_model
from fasterase.result import UnlearnResult
from tests import small_models


class Hub:
    """Stands in for `HfApi`: keeps what is uploaded in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.existing: dict[str, bool] = {}  # name -> whether it is private
        self.created: dict[str, bool] = {}
        self.message = self.token = None
        self.refusal = 409

    def __call__(self, token):
        self.token = token
        return self

    def create_repo(self, name, *, private):
        if name in self.existing or self.refusal == 401:
            from huggingface_hub.errors import HfHubHTTPError

            raise HfHubHTTPError("refused", response=Mock(status_code=self.refusal))
        self.created[name] = private
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def repo_info(self, name):
        return SimpleNamespace(id=name, private=self.existing[name])

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        import shutil

        self.message = commit_message
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


def result(module, **options):
    encoder = load_model(module, **options)
    return UnlearnResult(
        model=encoder.module,
        history=[],
        evaluation=None,
        verdict="forgotten",
        traces={},
        config=UnlearnConfig(
            lr=3e-5, output_dir="/home/me/secret", deepspeed="/home/me/secret/zero1.json"
        ),
        skipped=[],
        floor=0.0,
        removed_from_retain=[],
        seconds=1.0,
        encoder=encoder,
        original_weights={},
        sets={},
    )


def card(folder):
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_an_open_clip_model_is_uploaded_with_a_card(hub):
    erased = result(small_models.open_clip_vit(), tokenizer=small_models.simple_tokenizer())
    url = erased.push_to_hub("org/erased", private=True, commit_message="first", token="t")
    assert url == "https://huggingface.co/org/erased"
    assert (hub.created, hub.message, hub.token) == ({"org/erased": True}, "first", "t")
    header, text = card(hub.folder / "org/erased")
    assert header["library_name"] == "open_clip"
    assert {"fasterase", "machine-unlearning"} <= set(header["tags"])
    assert "verdict: forgotten" in text
    assert "lr=3e-05" in text
    assert "secret" not in text
    assert 'create_model_and_transforms("hf-hub:org/erased")' in text
    open_clip.create_model_and_transforms(f"local-dir:{hub.folder / 'org/erased'}")


def test_a_transformers_model_is_uploaded_under_the_full_name(hub):
    assert result(small_models.hf_clip()).push_to_hub("erased").endswith("/me/erased")
    assert hub.created == {"erased": False}
    header, text = card(hub.folder / "me/erased")
    assert header["library_name"] == "transformers"
    assert 'transformers.CLIPModel.from_pretrained("me/erased")' in text
    transformers.CLIPModel.from_pretrained(hub.folder / "me/erased")


def test_the_card_names_no_folder_of_this_machine(hub, tmp_path):
    load_model(small_models.hf_clip()).save(tmp_path / "private place" / "base")
    result(tmp_path / "private place" / "base").push_to_hub("erased")
    _, text = card(hub.folder / "me/erased")
    assert "`base`" in text
    assert "private place" not in text


def test_an_existing_repository_gets_a_commit_but_no_secret_becomes_public(hub):
    hub.existing = {"org/public": False, "org/private": True}
    erased = result(small_models.hf_clip())
    with pytest.raises(fasterase.InputError, match="private=True"):
        erased.push_to_hub("org/public", private=True)
    assert not hub.folder.exists()
    for name, private in (("org/public", False), ("org/private", True)):
        erased.push_to_hub(name, private=private)
        saved = json.loads((hub.folder / name / "config.json").read_text())
        assert saved["architectures"] == ["CLIPModel"]


def test_refusals_name_the_argument(hub):
    erased = result(small_models.hf_clip())
    with pytest.raises(fasterase.InputError, match="name: 'a/b/c'"):
        erased.push_to_hub("a/b/c")
    hub.refusal = 401
    with pytest.raises(fasterase.InputError, match="hf auth login"):
        erased.push_to_hub("org/erased")
