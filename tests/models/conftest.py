"""No test here may reach the network, and every kind of model is built once a run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch

from fasterase.models import DualEncoder, Tokens, load_model
from tests import small_models


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library reads the environment once, at import, which may lie before this fixture.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


BUILDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "open_clip_vit": small_models.open_clip_vit,
    "open_clip_resnet": small_models.open_clip_resnet,
    "open_clip_custom_text": small_models.open_clip_custom_text,
    "open_clip_siglip": lambda: small_models.open_clip_custom_text(siglip=True),
    "open_clip_coca": small_models.open_clip_coca,
    "hf_clip": small_models.hf_clip,
    "hf_siglip": small_models.hf_siglip,
    "hf_siglip2": small_models.hf_siglip2,
}


def build_tower(kind: str) -> DualEncoder:
    """A tower of its own weights, with the tokenizer and preprocessing that suit it."""
    tower = copy.copy(_template(kind))
    tower.module = copy.deepcopy(tower.module)
    return tower


@functools.cache
def _template(kind: str) -> DualEncoder:
    module = BUILDERS[kind]()
    if kind.startswith("open_clip"):
        return load_model(module, tokenizer=small_models.simple_tokenizer())
    if kind == "hf_siglip2":
        from transformers import Siglip2ImageProcessor

        processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    else:
        processor = small_models.hf_image_processor()
    return load_model(module, tokenizer=small_models.hf_tokenizer(), preprocess=processor)


@pytest.fixture(params=list(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tower(kind: str) -> DualEncoder:
    return build_tower(kind)


def batch_for(tower: DualEncoder, count: int = 4) -> tuple[torch.Tensor, Tokens]:
    """Random pixels and ids that the tower takes."""
    hf = type(tower.module).__module__.startswith("transformers")
    vocabulary = len(small_models.HF_VOCABULARY) if hf else small_models.SIMPLE_VOCABULARY_SIZE
    pixels, ids = small_models.random_pairs(vocabulary, count=count)
    return pixels, Tokens(ids)
