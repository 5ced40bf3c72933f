"""`tokenizer=` and `preprocess=` in every form, and what is wrong with the wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fasterase.errors import InputError
from fasterase.models import load_model
from tests import small_models

MODULE = small_models.open_clip_vit()


def words(texts: list[str]) -> torch.Tensor:
    ids = torch.zeros(len(texts), 16, dtype=torch.int32)
    for row, text in enumerate(texts):
        for column, word in enumerate(text.split()[:15]):
            ids[row, column] = len(word)
    ids[:, 15] = 49407
    return ids


def test_any_callable_tokenizes() -> None:
    tokens = load_model(MODULE, tokenizer=words).tokenize(("a red cat",))
    assert tokens.ids.tolist() == [[1, 3, 3, *[0] * 12, 49407]]
    assert tokens.ids.dtype == torch.int64
    assert tokens.mask is None


def test_open_clip_tokenizers_are_run_at_the_model_s_length() -> None:
    import open_clip

    tower = load_model(MODULE, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    assert tower.tokenize(["a cat"]).ids.shape == (1, 16)


def test_a_processor_brings_both() -> None:
    from transformers import CLIPProcessor

    class Processor(CLIPProcessor):
        """The library checks the tokenizer's class, which the small one does not have."""

        def __init__(self) -> None:
            self.tokenizer = small_models.hf_tokenizer()
            self.image_processor = small_models.hf_image_processor()

    both = load_model(small_models.hf_clip(), tokenizer=Processor())
    assert both.tokenize(["a cat"]).mask is not None
    assert both.preprocess(Image.new("RGB", (9, 9))).shape == (3, 32, 32)
    either = load_model(small_models.hf_clip(), preprocess=Processor())
    assert either.text_tokenizer is None
    assert either.preprocess(Image.new("L", (9, 9))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (7, "not callable"),
        (lambda texts: torch.zeros(len(texts), 99, dtype=torch.long), "99 tokens a text"),
        (lambda texts: torch.zeros(len(texts), 16), "float32"),
        (lambda texts: torch.zeros(3, 16, dtype=torch.long), r"\[1, 16\] are needed"),
        (lambda texts: torch.full((1, 16), 49408), "vocabulary has 49408"),
        (lambda texts: texts.nonsense, "failed on a plain caption"),
    ],
)
def test_wrong_tokenizers_are_named(tokenizer: object, says: str) -> None:
    with pytest.raises(InputError, match=f"^tokenizer: .*{says}"):
        load_model(MODULE, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("preprocess", "says"),
    [
        (7, "neither a callable"),
        (lambda image: image, "gave Image where a float tensor"),
        (lambda image: np.zeros((3, 32, 32)), "gave ndarray"),
        (lambda image: torch.zeros(3, 32, 32, dtype=torch.uint8), r"gave torch\.uint8"),
        (transforms.ToTensor(), r"\(3, 35, 39\), but the model takes \(3, 32, 32\)"),
        (lambda image: image.nonsense, "failed on a plain RGB image"),
    ],
)
def test_wrong_preprocess_is_named(preprocess: object, says: str) -> None:
    with pytest.raises(InputError, match=f"^preprocess: .*{says}"):
        load_model(MODULE, preprocess=preprocess)


def test_a_torchvision_transform_is_taken() -> None:
    transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    tower = load_model(MODULE, preprocess=transform)
    assert tower.preprocess(Image.new("RGB", (10, 20), (255, 0, 0)))[:, 0, 0].tolist() == [1, 0, 0]


def test_an_image_processor_of_another_size_is_named() -> None:
    with pytest.raises(InputError, match=r"^preprocess: .*\(3, 48, 48\)"):
        load_model(small_models.hf_clip(), preprocess=small_models.hf_image_processor(48))
