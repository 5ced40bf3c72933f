"""The original's features are computed once, for the pairs that are drawn, and found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.placebo import PLACEBOS
from fasterase.models.preprocessing import Tokens
from fasterase.original.features import Unmatched, floor_rows, unmatched_cosines
from fasterase.pairs.open import open_pairs
from tests.marks import SHORT_RUN
from tests.tiny_model import FORGET, Noisy, TinyModel, erase, pairs, same_weights, unchanged, watch

pytestmark = SHORT_RUN


class Watched(TinyModel):
    """Keeps what it encodes, apart: before the first step, in steps, and after the last one."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.images, self.texts = ({"before": [], "steps": [], "after": []} for _ in range(2))
        watch(self, "image", lambda pixels, _: self._note(self.images, pixels))
        watch(self, "text", lambda tokens, _: self._note(self.texts, tokens.ids))

    def _note(self, seen, rows):
        moment = "after" if seen["steps"] else "before"
        moment = "steps" if torch.is_grad_enabled() else moment
        seen[moment] += [row.numpy().tobytes() for row in rows]

    @property
    def swept(self):
        """Number of images and of texts encoded before the first step."""
        return len(self.images["before"]), len(self.texts["before"])


RETAIN = pairs(40, seed=2)


def swept(folder, *, forget=FORGET, retain=RETAIN, tower=None, **config):
    """The tower after a run, with what it has encoded."""
    tower = tower or Watched()
    erase(tower, forget, retain, **{"reference_cache": folder, "forget_augment": False, **config})
    return tower


@pytest.mark.parametrize("uses_reference", [True, False])
def test_only_pairs_that_are_used_are_swept_and_only_once(tmp_path, uses_reference):
    retain = pairs(3000, seed=2)
    users = ("consistency_weight", "anchor_weight", "cross_weight")
    config = {"retain": retain, **({} if uses_reference else dict.fromkeys(users, 0.0))}
    first = swept(tmp_path, **config)
    floor = [retain[row] for row in floor_rows(3000)]
    for seen, part in ((first.images, 0), (first.texts, 1)):
        wanted = {pair[part].numpy().tobytes() for pair in (*FORGET, *floor)} | set(seen["after"])
        assert len(seen["after"]) == 6 + 1000, "the pairs that are judged"
        assert not set(seen["steps"]) <= wanted
        if uses_reference:
            wanted |= set(seen["steps"])
        assert len(wanted) < 2000
        assert sorted(seen["before"]) == sorted(wanted)
    again = swept(tmp_path, **config)
    assert again.swept == (0, 0)
    assert same_weights(first.weights(), again.weights())
    longer = swept(tmp_path, **config, max_steps=5)
    assert 0 < longer.swept[0] <= 16 if uses_reference else longer.swept == (0, 0)


def test_without_a_folder_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    swept(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [60, -3], ids=["head", "feature"])
@pytest.mark.parametrize("part", ["captions", "images"])
def test_of_a_damaged_cache_only_the_damaged_block_is_remade(tmp_path, monkeypatch, part, place):
    monkeypatch.setattr("fasterase.original.features.BLOCK", 64)
    config = {"retain": pairs(200, seed=2), "max_steps": 2}
    one = swept(tmp_path, **config)
    blocks = sorted(tmp_path.glob(f"*/{part}*/*.safetensors"), key=lambda path: path.stat().st_size)
    assert len(blocks) >= 4
    data = bytearray(blocks[-1].read_bytes())
    data[place] ^= 0xFF
    blocks[-1].write_bytes(data)
    two = swept(tmp_path, **config)
    assert two.swept == (64, 64 if part == "captions" else 0)
    assert same_weights(one.weights(), two.weights())
    assert swept(tmp_path, **config).swept == (0, 0)


def test_other_models_data_and_precisions_find_nothing(tmp_path):
    swept(tmp_path)
    everything = (46, 46)
    assert swept(tmp_path, tower=Watched(seed=7)).swept == everything
    assert swept(tmp_path, precision="bf16").swept == everything
    (image, text), *others = RETAIN
    assert swept(tmp_path, retain=[(image + 1, text), *others]).swept == (40, 0), (
        "images anew, captions are known"
    )


def test_views_of_one_source_share_its_features(tmp_path):
    source = open_pairs(pairs(30, seed=1), name="retain")
    for n, expected in ((6, (30, 30)), (9, (0, 0))):
        assert swept(tmp_path, forget=source[:n], retain=source[n:]).swept == expected


def test_all_captions_of_a_pair_are_there_and_equal_ones_encoded_once(tmp_path):
    def tokenizer(texts):
        rows = [[1 + sum(map(ord, text)) % 40, len(text), 3, 4, 5] for text in texts]
        return Tokens(torch.tensor(rows))

    tower = Watched()
    tower.text_tokenizer = tokenizer
    images = [image for image, _ in pairs(20, seed=2)]
    retain = [(image, ["one", "two words", f"number {i % 2}"]) for i, image in enumerate(images)]
    forget = [(image, "gone") for image, _ in pairs(6, seed=1)]
    erase(tower, forget, retain, reference_cache=tmp_path)
    assert tower.swept == (26, 1 + 4 + PLACEBOS), "and made-up names, once"
    assert len(tower.texts["after"]) == 1 + 1, "the first captions, to judge"


def test_a_joint_matrix_needs_the_forget_pairs_reference_too(tmp_path):
    tower = swept(tmp_path, negatives="joint")
    assert not same_weights(tower.weights(), swept(None).weights())


@pytest.mark.filterwarnings("ignore:.retain. is not checked for images")
def test_random_items_get_a_live_reference_that_is_right():
    config = {"forget_augment": False, "max_steps": 1}
    with pytest.warns(UserWarning, match="beside the trained one in every step"):
        result = erase(retain=Noisy(pairs(12, seed=2)), **config)
    # At the first step the model is the original: nothing has moved yet if both saw the same view.
    assert result.history[0].anchor < 1e-9
    assert result.history[0].consistency < 1e-6
    still = erase(
        retain=TensorDataset(*map(torch.stack, zip(*pairs(12, seed=2), strict=True))), **config
    )
    assert still.history[0].anchor < 1e-9


def test_the_floor_is_between_unrelated_pairs():
    tower, retain = TinyModel(), pairs(12, seed=2)
    result = erase(retain=retain)
    with torch.no_grad():
        image, text = [], []
        for items in (FORGET, retain):
            pixels, ids = map(torch.stack, zip(*items, strict=True))
            image.append(tower.encode_image(pixels).numpy())
            text.append(tower.encode_text(Tokens(ids)).numpy())
    expected = np.mean([image[0] @ text[1].T, (image[1] @ text[0].T).T])
    assert result.floor == pytest.approx(expected, abs=1e-6)
    plain = {"forget_batch_size": 6, "forget_augment": False, "floor": 0.02}
    given = erase(retain=retain, **plain, forget_words=False, cross_weight=0.0)
    assert given.floor == result.floor, "the original's, whatever the loss is given"
    cosines = (image[0] * text[0]).sum(1)
    assert given.history[0].forget == pytest.approx(np.maximum(cosines - 0.02, 0).mean(), abs=1e-6)


@pytest.mark.parametrize(
    "changed", [{"seed": 5}, {"batch_size": 3}, {"max_steps": 7}, {"lr": "auto"}]
)
def test_the_floor_depends_on_model_and_pairs_only(tmp_path, changed):
    retain = pairs(1100, seed=2)
    config = {"retain": retain, "max_steps": 1, "reference_cache": tmp_path}
    first, other = (erase(**{**config, **change}).floor for change in ({}, changed))
    assert other == first


def features(keys, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.nn.functional.normalize(
        torch.randn(2, len(keys), 5, generator=generator), dim=-1
    )
    pair_text = [[i] for i in range(len(keys))]
    return PairFeatures(np.arange(len(keys)), image, text, keys, pair_text, [])


def test_equal_captions_are_left_out():
    forget, retain = features(["a", "a", "b"], 1), features(["c", "a", "d", "b"], 2)
    cosines = []
    for i, key in enumerate(forget.captions):
        for j, other in enumerate(retain.captions):
            if key != other:
                cosines.append(float(forget.image[i] @ retain.text[j]))
                cosines.append(float(retain.image[j] @ forget.text[i]))
    wanted = Unmatched(np.mean(cosines), np.std(cosines))
    assert unmatched_cosines(forget, retain) == pytest.approx(wanted, abs=1e-6)
    # Nothing to compare is zero.
    assert unmatched_cosines(features(["a"], 1), features(["a", "a"], 2)) == (0.0, 0.0)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_model_of_non_finite_features_is_refused_as_such(tower):
    forget, retain = features(["a"], 1), features(["b", "c"], 2)
    getattr(retain, tower)[1, 0] = torch.nan
    with pytest.raises(InputError, match=r"^model: its features are NaN"):
        unmatched_cosines(forget, retain)


def unnoticed(pairs):
    """Pairs with the manifest of all others."""
    source = open_pairs(pairs, name="retain")
    source.__dict__["_digest"] = "0" * 32
    return source


OTHERS = [(RETAIN[row - 1][0], text) for row, (_, text) in enumerate(RETAIN)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_does_not_begin_at_the_original_is_stopped_and_says_why(tmp_path, precision):
    swept(tmp_path, retain=unnoticed(RETAIN), precision=precision)
    tower = TinyModel()
    named = r"the image features of 8 of 8 pairs, such as retain\[\d+\], .* remove .*-?\w+, and run"
    with unchanged(tower.module), pytest.raises(InputError, match=named):
        swept(tmp_path, retain=unnoticed(OTHERS), precision=precision, tower=tower)
    # Dropout alone would make them others.
    swept(tmp_path, retain=unnoticed(OTHERS), precision=precision, train_mode=True)
