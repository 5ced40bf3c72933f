"""Processors give their parts, and tokenizer and preprocessing stay with a model once known."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPProcessor

import fasterase
from fasterase.errors import InputError
from fasterase.models import load_model
from tests import small_models
from tests.models.conftest import build_model, noise_picture

STEPS = {"max_steps": 1, "batch_size": 4, "forget_batch_size": 2, "progress": False}
PAIRS = [(noise_picture(40, 36 + i), f"thing number {i}") for i in range(8)]

pytestmark = pytest.mark.filterwarnings("ignore:(verdict|retain): ")


class Processor(CLIPProcessor):
    """The library checks the tokenizer's class, which the small one does not have."""

    def __init__(self):
        self.tokenizer = small_models.hf_tokenizer()
        self.image_processor = small_models.hf_image_processor()


def erase(model, **options):
    return fasterase.unlearn(model, PAIRS[:2], PAIRS[2:], **{**STEPS, **options})


@pytest.mark.parametrize("argument", ["tokenizer", "preprocess"])
def test_a_processor_gives_both(argument):
    model = load_model(small_models.hf_clip(), **{argument: Processor()})
    assert model.tokenize(["a cat"]).mask is not None
    assert model.preprocess(Image.new("L", (9, 9))).shape == (3, 32, 32)
    vocabulary = len(small_models.HF_VOCABULARY)
    module = small_models.open_clip_vit(vocab_size=vocabulary)
    assert load_model(module, **{argument: Processor()}).tokenize(["a cat"]).ids.shape == (1, 16)


def test_the_other_argument_wins_over_a_processor_s_part():
    tokenizer = small_models.hf_tokenizer()
    model = load_model(small_models.hf_clip(), preprocess=Processor(), tokenizer=tokenizer)
    assert model.companions.tokenizer is tokenizer
    processor = small_models.hf_image_processor()
    model = load_model(small_models.hf_clip(), tokenizer=Processor(), preprocess=processor)
    assert model.companions.preprocess is processor


def test_words_of_other_libraries_are_understood():
    module = small_models.hf_clip()
    with pytest.raises(InputError, match=r"`processor`.*preprocess= or tokenizer="):
        erase(module, processor=Processor())
    with pytest.raises(InputError, match=r"tokenizer: CLIPImageProcessor\w* is an image processor"):
        erase(module, tokenizer=small_models.hf_image_processor())
    with pytest.raises(InputError, match=r"preprocess: \w+ is a tokenizer; pass it as tokenizer="):
        erase(module, preprocess=small_models.hf_tokenizer())


def test_a_result_finds_its_tokenizer_and_preprocessing_again():
    tokenizer, processor = small_models.hf_tokenizer(), small_models.hf_image_processor()
    module = small_models.hf_clip()
    result = erase(module, tokenizer=tokenizer, preprocess=processor, evaluation=None)
    assert result.tokenizer is tokenizer
    assert result.preprocess is processor
    fasterase.evaluate(result.model, PAIRS[:2], PAIRS[2:])
    again = erase(copy.deepcopy(result.model), evaluation=None)
    assert again.tokenizer is tokenizer
    wrapped = erase(nn.DataParallel(result.model), evaluation=None)
    assert wrapped.preprocess is processor
    other = small_models.hf_tokenizer()
    assert erase(result.model, tokenizer=other, evaluation=None).tokenizer is other


def test_a_model_loaded_by_name_carries_them(tmp_path):
    vocabulary = len(small_models.HF_VOCABULARY)
    load_model(
        small_models.open_clip_vit(vocab_size=vocabulary), tokenizer=small_models.hf_tokenizer()
    ).save(tmp_path / "model")
    result = erase(tmp_path / "model", evaluation=None)
    picture = noise_picture(50, 40)
    assert torch.equal(result.preprocess(picture), result.encoder.preprocess(picture))
    found = load_model(result.model)
    assert found.companions.tokenizer is result.tokenizer
    # An architecture without a name in open_clip gives no tokenizer by itself.
    assert load_model(small_models.open_clip_vit(vocab_size=vocabulary)).text_tokenizer is None


def test_they_are_in_no_state_dict_and_no_pickle():
    module = small_models.open_clip_vit()
    expected = list(module.state_dict())
    result = erase(
        module, tokenizer=lambda texts: torch.ones(len(texts), 16).long(), evaluation=None
    )
    assert list(result.model.state_dict()) == expected
    pickled = pickle.dumps(result.model)
    assert b"fasterase." not in pickled, "it can be read where fasterase is not installed"
    assert load_model(pickle.loads(pickled)).text_tokenizer is None


def test_half_known_companions_are_none():
    module = small_models.hf_clip()
    pixels, ids = small_models.random_pairs()
    pairs = list(zip(pixels, ids, strict=True))
    result = fasterase.unlearn(module, pairs[:2], pairs[2:], **STEPS, evaluation=None)
    assert result.tokenizer is None
    assert result.preprocess is None
    known = build_model("hf_siglip2")
    again = load_model(known.module, **vars(known.companions))
    picture = noise_picture(50, 40)
    assert torch.equal(again.preprocess(picture), known.preprocess(picture))
