"""`tokenizer=` and `preprocess=` in every form, transforms in two parts, what a model remembers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from transformers import CLIPProcessor, PreTrainedTokenizerFast

import fasterase
from fasterase.errors import InputError
from fasterase.models import load_model
from fasterase.models.preprocessing import (
    ImageTransform,
    TextTokenizer,
    build_open_clip_transform,
    describe_transform,
    wrap_transform,
)
from fasterase.vocabulary import UNREADABLE
from tests import small_models
from tests.models.conftest import build_model, noise_picture

MODULE = small_models.open_clip_vit()

pytestmark = pytest.mark.filterwarnings("ignore:(verdict|retain): ")


def words(texts):
    ids = torch.zeros(len(texts), 16, dtype=torch.int32)
    for row, text in enumerate(texts):
        for column, word in enumerate(text.split()[:15]):
            ids[row, column] = len(word)
    ids[:, 15] = 49407
    return ids


def test_any_callable_tokenizes():
    tokens = load_model(MODULE, tokenizer=words).tokenize(("a red cat",))
    assert tokens.ids.tolist() == [[1, 3, 3, *[0] * 12, 49407]]
    assert tokens.ids.dtype == torch.int64
    assert tokens.mask is None


def test_open_clip_tokenizers_are_run_at_the_model_s_length():
    import open_clip

    model = load_model(MODULE, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    assert model.tokenize(["a cat"]).ids.shape == (1, 16)


def test_a_word_that_a_closed_vocabulary_lacks_is_no_crash():
    """Whoever measures words of the language at large goes on without them (`UNREADABLE`)."""
    known = {"[PAD]": 0, "a": 1, "photo": 2, "of": 3, "cat": 4, "the": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known))  # no unk_token among them
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    tokenize = TextTokenizer(fast, 16, with_mask=False)
    assert tokenize(["a cat"]).ids[0, :2].tolist() == [1, 4]
    with pytest.raises(UNREADABLE, match=r"tokenizer: .*(?i:unk)"):
        tokenize(["a dog"])


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (7, "not callable"),
        (lambda texts: torch.zeros(len(texts), 99, dtype=torch.long), "99 tokens per text"),
        (lambda texts: torch.zeros(len(texts), 16), "float32"),
        (lambda texts: torch.zeros(3, 16, dtype=torch.long), r"\[1, 16\] are needed"),
        (lambda texts: torch.full((1, 16), 49408), "vocabulary has 49408"),
        (lambda texts: texts.nonsense, "failed on a plain caption"),
    ],
)
def test_wrong_tokenizers_are_named(tokenizer, says):
    with pytest.raises(InputError, match=f"^tokenizer: .*{says}"):
        load_model(MODULE, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("preprocess", "says"),
    [
        (7, "neither a callable"),
        (lambda image: image, "gave Image, but"),
        (lambda image: np.zeros((3, 32, 32)), "gave ndarray, but"),
        (lambda image: torch.zeros(3, 32, 32, dtype=torch.uint8), r"gave torch\.uint8 of"),
        (transforms.ToTensor(), r"\(3, 35, 39\), but the model takes .*\(3, 32, 32\)"),
        (lambda image: image.nonsense, "failed on a plain RGB image"),
        (small_models.hf_image_processor(48), r"\(3, 48, 48\)"),
    ],
)
def test_wrong_preprocess_is_named(preprocess, says):
    with pytest.raises(InputError, match=f"^preprocess: .*{says}"):
        load_model(MODULE, preprocess=preprocess)


NORMALISE = transforms.Normalize(small_models.MEAN, small_models.STD)


def compose(*ending):
    return transforms.Compose([transforms.Resize((32, 32)), *ending])


def siglip_processor(**options):
    from transformers import SiglipImageProcessor

    return SiglipImageProcessor(size={"height": 32, "width": 32}, **options)


def naflex_processor():
    from transformers import Siglip2ImageProcessor

    return Siglip2ImageProcessor(patch_size=8, max_num_patches=16, image_mean=[0.1, 0.2, 0.3])


SPLITTING: dict[str, Callable[[], object]] = {
    "compose": lambda: compose(transforms.ToTensor(), NORMALISE),
    "compose of one mean": lambda: compose(
        transforms.ToTensor(), transforms.Normalize([0.4], [0.2])
    ),
    "compose without normalise": lambda: compose(transforms.ToTensor()),
    "random crop": lambda: transforms.Compose(
        [transforms.RandomResizedCrop(32), transforms.ToTensor(), NORMALISE]
    ),
    "clip": small_models.hf_image_processor,
    "siglip": siglip_processor,
    "siglip without rescaling": lambda: siglip_processor(do_rescale=False, do_normalize=False),
    "siglip without normalise": lambda: siglip_processor(do_normalize=False),
    "naflex": naflex_processor,
}
WHOLE: dict[str, Callable[[], object]] = {
    "callable": lambda: lambda image: compose(transforms.ToTensor(), NORMALISE)(image),
    "step after normalise": lambda: compose(
        transforms.ToTensor(), NORMALISE, transforms.RandomErasing(p=1.0)
    ),
    "step between": lambda: compose(
        transforms.ToTensor(), transforms.ColorJitter(brightness=0.5), NORMALISE
    ),
    "head that returns a tensor": lambda: compose(transforms.PILToTensor(), FloatTensor()),
    "other statistics": lambda: compose(transforms.ToTensor(), OffsetNormalise((0.5,), (0.5,))),
    "another ending": lambda: transforms.Compose([Resized()]),
}


class FloatTensor(transforms.ToTensor):
    def __call__(self, pic):
        return pic / 255


class OffsetNormalise(transforms.Normalize):
    """Not what its mean and std say."""

    def forward(self, tensor):
        return super().forward(tensor) + 0.01


class Resized:
    def __call__(self, image):
        return compose(transforms.ToTensor())(image)


def seeded(run, picture):
    torch.manual_seed(5)
    return run(picture)


@pytest.mark.parametrize("form", SPLITTING)
def test_both_parts_give_what_the_whole_gives(form):
    transform = wrap_transform(SPLITTING[form](), (32, 32))
    assert transform.parts is not None
    picture = noise_picture(51, 43)
    pixels = seeded(transform.pixels, picture)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 32, 32)
    assert pixels.is_contiguous()
    expected = seeded(transform, picture)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(transform.normalise(pixels), expected, rtol=0, atol=1e-5)
    batch = torch.stack([pixels, 255 - pixels])
    torch.testing.assert_close(transform.normalise(batch)[0], expected, rtol=0, atol=1e-5)
    assert batch.dtype == torch.uint8
    assert transform.normalise(expected) is expected


@pytest.mark.parametrize("form", WHOLE)
def test_other_callables_run_whole(form):
    preprocess = WHOLE[form]()
    transform = wrap_transform(preprocess, (32, 32))
    assert transform.parts is None
    picture = noise_picture(51, 43)
    expected = seeded(preprocess, picture)
    for part in (transform, transform.pixels):
        assert torch.equal(seeded(part, picture), expected)
    assert transform.normalise(expected) is expected
    with pytest.raises(InputError, match=r"^preprocess: torch\.uint8 .*Compose that ends in ToTen"):
        transform.normalise(torch.zeros(3, 32, 32, dtype=torch.uint8))


def test_open_clip_transforms_split_exactly():
    for mode in ("shortest", "longest", "squash"):
        settings = {"size": [32, 32], "mean": small_models.MEAN, "resize_mode": mode}
        transform = build_open_clip_transform(settings, (32, 32))
        for picture in (noise_picture(51, 43), noise_picture(20, 90).convert("L")):
            pixels = transform.pixels(picture)
            assert pixels.dtype == torch.uint8
            assert torch.equal(transform.normalise(pixels), transform(picture))


@pytest.mark.parametrize("form", SPLITTING)
def test_transforms_pickle_and_describe_themselves_as_before(form):
    preprocess = SPLITTING[form]()
    transform = wrap_transform(preprocess, (32, 32))
    again = pickle.loads(pickle.dumps(transform))
    picture = noise_picture(40, 60)
    assert torch.equal(seeded(again.pixels, picture), seeded(transform.pixels, picture))
    assert torch.equal(seeded(again, picture), seeded(transform, picture))
    assert describe_transform(again) == describe_transform(transform)
    assert describe_transform(transform) == describe_transform(transform.whole)
    assert "Parts" not in describe_transform(transform)


def test_wrapping_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    wrap_transform(SPLITTING["random crop"](), (32, 32))
    assert torch.equal(torch.rand(2), expected)


def test_another_model_s_transform_is_taken():
    first = wrap_transform(small_models.hf_image_processor(), (32, 32))
    second = wrap_transform(first, (32, 32))
    assert isinstance(second, ImageTransform)
    assert second == first
    with pytest.raises(InputError, match="int32"):
        second.normalise(torch.zeros(3, 32, 32, dtype=torch.int32))


# Processors give their parts; tokenizer and preprocessing stay with a model once known.
STEPS = {"max_steps": 1, "batch_size": 4, "forget_batch_size": 2, "progress": False}
PAIRS = [(noise_picture(40, 36 + i), f"thing number {i}") for i in range(8)]


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
