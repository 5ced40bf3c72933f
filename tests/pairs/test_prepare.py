"""Pixels, tokens and caption identities out of records; random views of forget images."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fasterase.errors import InputError
from fasterase.models.preprocessing import ImageTransform, Tokens, TransformParts
from fasterase.pairs import prepare
from fasterase.pairs.items import Record
from fasterase.pairs.prepare import (
    PLAIN,
    TINT,
    Preparer,
    alter,
    augment,
    caption_key,
    hash_captions,
    stack_tokens,
)
from fasterase.pairs.skips import BrokenPair
from tests.pairs.reading import picture, resized, tokenizer, transform

TOKENIZER = partial(tokenizer, length=8, with_mask=True)
READY = Preparer(ImageTransform(transform), TOKENIZER, (4, 4), 8, 1000)
SPLIT = Preparer(ImageTransform(transform, TransformParts(resized)), TOKENIZER, (4, 4), 8, 1000)
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


def test_uint8_and_pil_take_the_same_way():
    image = picture(9)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    pixels = READY.image(Record(image, "x", "a"))
    assert pixels.shape == (3, 4, 4)
    assert torch.equal(pixels, READY.image(Record(tensor, "x", "a")))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode_become_rgb(mode):
    image = Image.new("I;16", (9, 7)) if mode == "I;16" else picture(9).convert(mode)
    assert READY.image(Record(image, "x", "a")).shape == (3, 4, 4)


def test_missing_preprocess_and_tokenizer_are_named():
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


def test_pixels_stay_uint8_if_the_transform_splits_and_all_are():
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


def view(pixels, seed=0, **options):
    return alter(pixels, np.random.default_rng(seed), **options)


def drawing(height=32, width=48):
    """A dark square off the centre of white paper, pixel values 0 to 1."""
    pixels = torch.ones(3, height, width)
    pixels[:, height // 4 : height // 2, width // 4 : width // 2] = 0.1
    return pixels


def test_repeats_by_seed_and_differs_between_seeds():
    pixels = drawing()
    assert torch.equal(view(pixels, 3), view(pixels, 3))
    assert not torch.equal(view(pixels, 3), view(pixels, 4))
    assert view(pixels).shape == pixels.shape
    assert torch.equal(pixels, drawing())


@pytest.mark.parametrize("seed", range(5))
def test_white_paper_takes_a_colour_to_the_corners_and_the_shape_survives(seed):
    """The square keeps about its area (zoom within 1.25) and its sides stay in proportion."""
    result = view(drawing(), seed, black=torch.zeros(3))
    corners = result[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners - corners[:, :1]).abs().max() < 1e-5
    paper = corners[:, 0]
    assert (paper >= 1 - TINT - 1e-5).all()
    assert (paper <= 1).all()
    assert paper.max() - paper.min() > 0.01
    dark = (result < 0.4).all(dim=0)
    area = int(dark.sum())
    assert 96 / 1.25**2 * 0.7 < area < 96 * 1.25**2 * 1.3
    rows, columns = torch.where(dark)
    assert 0.5 < (columns.max() - columns.min() + 1) / (rows.max() - rows.min() + 1) / 1.5 < 2


def test_preprocessing_does_not_change_the_view():
    """Augmenting normalised pixels is normalising augmented ones, given what black became."""
    mean = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1)
    std = torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)
    plain = (view(drawing(), 1, black=torch.zeros(3)) - mean) / std
    normalised = view((drawing() - mean) / std, 1, black=(-mean / std).flatten())
    torch.testing.assert_close(normalised, plain, atol=1e-5, rtol=0)


def test_without_a_black_level_the_darkest_pixel_stays():
    result = view(drawing() * 2 - 5)
    assert torch.isfinite(result).all()
    assert result.min() >= -4.8 - 1e-4


def test_a_share_of_the_views_is_the_image_itself():
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = np.random.default_rng(0)
    same = [torch.equal(augment(pixels, generator), pixels) for _ in range(400)]
    assert abs(np.mean(same) - PLAIN) < 0.1


def test_uint8_pixels_get_the_view_of_their_floats_rounded():
    pixels = (drawing() * 255).round().to(torch.uint8)
    seeds = [seed for seed in range(20) if np.random.default_rng(seed).uniform() >= PLAIN]
    for seed in seeds:
        generator = np.random.default_rng(seed)
        found = augment(pixels, np.random.default_rng(seed))
        generator.uniform()
        expected = alter(pixels.float(), generator, black=torch.zeros(3))
        assert found.dtype == torch.uint8
        assert (found.float() - expected.clamp(0, 255)).abs().max() <= 0.5
        assert not torch.equal(found, pixels)
