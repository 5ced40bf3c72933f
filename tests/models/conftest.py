"""Models of every kind, each built once per run; no test here may reach the network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from PIL import Image

import fasterase
from fasterase.models import Tokens, load_model
from tests import small_models, tiny_model


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    # The library reads the environment once, at import, which may happen before this fixture.
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


def build_model(kind):
    """Build a model with weights of its own, a matching tokenizer and preprocessing."""
    model = copy.copy(_template(kind))
    model.module = copy.deepcopy(model.module)
    return model


@functools.cache
def _template(kind):
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
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return build_model(kind)


def batch_for(model, count=4):
    """Return random pixels and ids that the model takes."""
    pixels, ids = small_models.random_pairs(vocabulary_of(model.module), count=count)
    return pixels, Tokens(ids)


def noise_picture(width, height):
    """Return an RGB picture in which every value of a channel occurs."""
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(256, (height, width, 3), generator=generator).to(torch.uint8)
    return Image.fromarray(values.numpy())


class Malicious:
    """Writes to `trace` when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (self.trace.write_text, ("executed",))


STEPS = {**tiny_model.STEPS, "lr": 1e-2, "max_steps": 2}


def vocabulary_of(module):
    """That of a module, wrapped or not."""
    hf = any(type(part).__module__.startswith("transformers") for part in module.modules())
    return len(small_models.HF_VOCABULARY) if hf else small_models.SIMPLE_VOCABULARY_SIZE


def pairs(module=None):
    """Twelve pairs of pixels and ids that the module, or else a transformers model, takes."""
    vocabulary = len(small_models.HF_VOCABULARY) if module is None else vocabulary_of(module)
    return list(zip(*small_models.random_pairs(vocabulary, count=12), strict=True))


def erase(given, **options):
    """Run two steps, of four pairs to forget and eight to keep."""
    items = pairs(given)
    return fasterase.unlearn(given, items[:4], items[4:], **{**STEPS, **options})


def features(given):
    """Features of four other pairs, images and texts."""
    model = load_model(given)
    pixels, ids = small_models.random_pairs(vocabulary_of(model.module), count=4, seed=7)
    with torch.no_grad():
        return torch.cat([model.encode_image(pixels), model.encode_text(Tokens(ids))])
