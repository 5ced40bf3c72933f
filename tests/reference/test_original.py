"""The original's features are computed once, for the pairs that are drawn, and found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fasterase
from fasterase.pairs.open import open_pairs
from fasterase.pairs.source import Subset
from tests.tiny_model import TinyModel, pairs, same_weights

STEPS = {
    "lr": 1e-3,
    "batch_size": 8,
    "forget_batch_size": 4,
    "max_steps": 3,
    "progress": False,
    "evaluation": None,
}


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """A few steps do not forget, and `unlearn` warns of it."""


class Counting(TinyModel):
    """Counts the rows that are encoded without a graph: the sweep's, and the last check's."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.images = self.texts = 0

    def encode_image(self, pixels):
        self.images += 0 if torch.is_grad_enabled() else len(pixels)
        return super().encode_image(pixels)

    def encode_text(self, tokens):
        self.texts += 0 if torch.is_grad_enabled() else len(tokens.ids)
        return super().encode_text(tokens)


def swept(folder, *, forget=None, retain=None, tower=None, **config):
    """Rows (images, texts) that the sweep before training encoded, and the erased tower."""
    tower = tower or Counting()
    forget, retain = forget or pairs(6, seed=1), retain or pairs(40, seed=2)
    settings = {**STEPS, "reference_cache": folder, **config}
    fasterase.unlearn(tower, forget, retain, **settings)
    return (tower.images - len(forget), tower.texts - len(forget)), tower


def test_only_drawn_pairs_are_swept_and_only_once(tmp_path):
    first, one = swept(tmp_path)
    assert first == (6 + 24, 6 + 24), "forget for the floor, and three batches of eight of retain"
    again, two = swept(tmp_path)
    assert again == (0, 0)
    assert same_weights(one.weights(), two.weights())
    longer, _ = swept(tmp_path, max_steps=5)
    assert longer == (16, 16)


def test_without_a_folder_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    swept(None)
    assert list(tmp_path.iterdir()) == []


def test_unused_references_are_not_swept_but_for_the_floor(tmp_path):
    retain = pairs(1100, seed=2)
    rows, _ = swept(tmp_path, retain=retain, consistency_weight=0.0, anchor_weight=0.0)
    assert rows == (6 + 1024, 6 + 1024)


@pytest.mark.parametrize("part", ["captions", "images"])
def test_a_damaged_cache_is_remade(tmp_path, part):
    _, one = swept(tmp_path)
    block = next(tmp_path.glob(f"*/{part}*/*.npy"))
    data = bytearray(block.read_bytes())
    data[-3] ^= 0xFF
    block.write_bytes(data)
    rows, two = swept(tmp_path)
    assert sum(rows) > 0
    assert same_weights(one.weights(), two.weights())


def test_other_models_data_and_precisions_find_nothing(tmp_path):
    swept(tmp_path)
    everything = (30, 30)
    assert swept(tmp_path, tower=Counting(seed=7))[0] == everything
    assert swept(tmp_path, precision="bf16")[0] == everything
    other = pairs(40, seed=2)
    other[0] = (other[0][0] + 1, other[0][1])
    assert swept(tmp_path, retain=other)[0] == (24, 0), "images anew, captions are known"


def test_views_of_one_source_share_its_features(tmp_path):
    source = open_pairs(pairs(30, seed=1), name="retain")
    forget, retain = Subset(source, range(6), name="f"), Subset(source, range(6, 30), name="r")
    assert swept(tmp_path, forget=forget, retain=retain)[0] == (30, 30)
    forget, retain = Subset(source, range(9), name="f"), Subset(source, range(9, 30), name="r")
    assert swept(tmp_path, forget=forget, retain=retain)[0] == (0, 0)


def test_all_captions_of_a_pair_are_there_and_equal_ones_encoded_once(tmp_path):
    def tokenizer(texts):
        rows = [[1 + sum(map(ord, text)) % 40, len(text), 3, 4, 5] for text in texts]
        return fasterase.models.dual_encoder.Tokens(torch.tensor(rows))

    tower = Counting()
    tower.text_tokenizer = tokenizer
    images = [image for image, _ in pairs(20, seed=2)]
    retain = [(image, ["one", "two words", f"number {i % 2}"]) for i, image in enumerate(images)]
    forget = [(image, "gone") for image, _ in pairs(6, seed=1)]
    fasterase.unlearn(tower, forget, retain, reference_cache=tmp_path, **STEPS)
    assert tower.texts == 1 + 4 + 1, "and the forgotten caption once more at the end"


def test_a_joint_matrix_needs_the_forget_pairs_reference_too(tmp_path):
    _, tower = swept(tmp_path, negatives="joint")
    assert not same_weights(tower.weights(), swept(None)[1].weights())


def test_random_items_get_a_live_reference_that_is_right():
    class Flipping(torch.utils.data.Dataset):
        def __init__(self, noise):
            self.noise = noise
            self.items = pairs(12, seed=2)

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            pixels, ids = self.items[index]
            # A caption that no second read gives again, as random prompts do.
            ids = torch.cat([ids[:4], torch.randint(1, 50, (1,))]) if self.noise else ids
            return pixels + self.noise * torch.randn_like(pixels), ids

    config = {**STEPS, "forget_augment": False, "max_steps": 1}
    with pytest.warns(UserWarning, match="beside the trained one in every step"):
        result = fasterase.unlearn(TinyModel(), pairs(6, seed=1), Flipping(0.5), **config)
    # At the first step the model is the original: nothing has moved yet if both saw the same view.
    assert result.history[0].anchor < 1e-9
    assert result.history[0].consistency < 1e-6
    still = fasterase.unlearn(TinyModel(), pairs(6, seed=1), Flipping(0.0), **config)
    assert still.history[0].anchor < 1e-9


def test_the_floor_is_between_unrelated_pairs():
    tower = TinyModel()
    forget, retain = pairs(6, seed=1), pairs(12, seed=2)
    result = fasterase.unlearn(TinyModel(), forget, retain, **STEPS)
    with torch.no_grad():
        image, text = [], []
        for items in (forget, retain):
            pixels, ids = map(torch.stack, zip(*items, strict=True))
            image.append(tower.encode_image(pixels).numpy())
            text.append(tower.encode_text(fasterase.models.dual_encoder.Tokens(ids)).numpy())
    expected = np.mean([image[0] @ text[1].T, (image[1] @ text[0].T).T])
    assert result.floor == pytest.approx(expected, abs=1e-6)
    assert fasterase.unlearn(TinyModel(), forget, retain, floor=0.3, **STEPS).floor == 0.3
