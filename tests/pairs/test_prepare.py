"""Pixels, tokens and caption identities out of records."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fasterase.errors import InputError
from fasterase.models.preprocessing import ImageTransform, Tokens, TransformParts
from fasterase.pairs import prepare
from fasterase.pairs.items import Record
from fasterase.pairs.prepare import Preparer, caption_key, hash_captions, stack_tokens
from fasterase.pairs.skips import BrokenPair


def transform(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    values = np.asarray(image.resize((4, 4)), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 255


def tokenizer(texts) -> Tokens:
    ids = torch.zeros(len(texts), 8, dtype=torch.long)
    for row, text in enumerate(texts):
        codes = torch.tensor([ord(c) for c in text[:8]])
        ids[row, : len(codes)] = codes
    return Tokens(ids, (ids > 0).long())


READY = Preparer(ImageTransform(transform), tokenizer, (4, 4), 8, 1000)
BARE = Preparer(None, None, (4, 4), 8, 1000)


def test_float_tensors_pass_as_they_are():
    pixels = torch.randn(3, 4, 4)
    assert torch.equal(READY.image(Record(pixels, "x", "a")), pixels)
    half = READY.image(Record(pixels.half(), "x", "a"))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 4), (4, 4, 3)])
def test_float_tensors_of_another_size_name_the_models(shape):
    with pytest.raises(InputError, match=r"forget.3.: .*size \[3, 4, 4\]; found .*Resize"):
        READY.image(Record(torch.zeros(shape), "x", "forget[3]"))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_non_finite_pixels_make_a_broken_pair(value, word):
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(BrokenPair, match=f"forget.3.: image holds {word} values"):
        READY.image(Record(pixels, "x", "forget[3]"))


def test_uint8_and_pil_take_the_same_way(picture):
    image = picture(9)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    pixels = READY.image(Record(image, "x", "a"))
    assert pixels.shape == (3, 4, 4)
    assert torch.equal(pixels, READY.image(Record(tensor, "x", "a")))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode_become_rgb(picture, mode):
    image = Image.new("I;16", (9, 7)) if mode == "I;16" else picture(9).convert(mode)
    assert READY.image(Record(image, "x", "a")).shape == (3, 4, 4)


def test_missing_preprocess_and_tokenizer_are_named(picture):
    with pytest.raises(InputError, match="`preprocess`"):
        BARE.image(Record(picture(1), "x", "a"))
    with pytest.raises(InputError, match="`tokenizer`"):
        BARE.text(Record(None, "x", "a"))
    record = Record(torch.zeros(3, 4, 4), torch.tensor([1, 2]), "a")
    assert torch.equal(BARE.image(record), record.image)
    assert BARE.text(record).tokens.ids.tolist() == [1, 2]


def test_caption_index_wraps_around():
    record = Record(None, ["a", "b", "c"], "id")
    for raw in range(7):
        text = READY.text(record, raw)
        assert text.key == "abc"[raw % 3]
        assert text.tokens.ids.tolist() == [ord(text.key)] + [0] * 7
        assert text.tokens.mask.tolist() == [1] + [0] * 7


def test_ids_keep_their_mask():
    mask = torch.tensor([1, 1, 0])
    text = BARE.text(Record(None, torch.tensor([5, 6, 0]), "a", mask=mask), 17)
    assert text.tokens.mask is mask


def resized(image: Image.Image) -> torch.Tensor:
    values = np.asarray(image.resize((4, 4)))
    return torch.from_numpy(values.copy()).permute(2, 0, 1)


SPLIT = Preparer(ImageTransform(transform, TransformParts(resized)), tokenizer, (4, 4), 8, 1000)


def test_pixels_stay_uint8_if_the_transform_splits_and_all_are(picture):
    """A fourth of the memory of floats, on the way from the workers to the device."""
    images = [SPLIT.image(Record(picture(shade), "x", "a")) for shade in (3, 9)]
    stacked = SPLIT.stack(images)
    assert stacked.dtype == torch.uint8
    floats = torch.stack([READY.image(Record(picture(shade), "x", "a")) for shade in (3, 9)])
    torch.testing.assert_close(SPLIT.image_transform.normalise(stacked), floats)
    tensor = torch.rand(3, 4, 4)
    mixed = SPLIT.stack([images[0], SPLIT.image(Record(tensor, "x", "b"))])
    torch.testing.assert_close(mixed, torch.stack([floats[0], tensor]))


def test_hashes_of_captions_are_the_same_in_every_process():
    a, b = 3405396810240292928, 8453121595177857668
    assert hash_captions(["a", "b", "a"]).tolist() == [a, b, a]
    assert hash_captions([]).shape == (0,)


def test_caption_keys_tell_captions_apart_and_ignore_padding():
    assert caption_key(torch.tensor([1, 0, 2, 0])) == caption_key(torch.tensor([1, 0, 2]))
    assert caption_key(torch.tensor([1, 2])) != caption_key(torch.tensor([2, 1]))
    assert caption_key("a") == "a"


def test_stacking_pads_to_the_longest_row():
    rows = [Tokens(torch.tensor([1, 2]), None), Tokens(torch.tensor([3]), torch.tensor([1]))]
    tokens = stack_tokens(rows, 8)
    assert tokens.ids.tolist() == [[1, 2], [3, 0]]
    assert tokens.mask.tolist() == [[1, 1], [1, 0]]
    assert stack_tokens(rows[:1], 8).mask is None
    assert stack_tokens([], 8).ids.shape == (0, 8)


def test_a_preparer_pickles():
    assert pickle.loads(pickle.dumps(READY)).image_size == (4, 4)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (range(9), "9 token ids, but the model takes at most 8"),
        ([1, 1000], "token ids from 1 to 1000, but the model's vocabulary has 1000"),
        ([-1, 5], "token ids from -1 to 5"),
    ],
)
def test_token_ids_that_the_model_lacks_are_refused(ids, says):
    with pytest.raises(InputError, match=f"pair 7: {says}"):
        BARE.text(Record(None, torch.tensor(ids), "pair 7"))


def test_a_caption_is_tokenised_once(monkeypatch):
    """Up to a number of captions: steps and checks read the same pairs again and again."""
    monkeypatch.setattr(prepare, "KNOWN_CAPTIONS", 2)
    seen = []

    def tokenize(texts):
        seen.extend(texts)
        return Tokens(torch.tensor([[len(text)] for text in texts]), None)

    preparer = Preparer(None, tokenize, (4, 4), 1, 100)
    captions = ["a", "bb", "a", "ccc", "bb", "ccc"]
    found = [preparer.text(Record(None, text, "pair")).tokens.ids.item() for text in captions]
    assert found == [1, 2, 1, 3, 2, 3]
    assert seen == ["a", "bb", "ccc", "ccc"]
