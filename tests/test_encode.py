"""One loop encodes pairs: each pair once per model, whoever needs its features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from fasterase.encode import PairEncoder
from fasterase.engine import run
from fasterase.errors import InputError
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import SkipLedger
from tests.marks import SHORT_RUN
from tests.tiny_model import FORGET, RETAIN, TinyModel, erase, pairs, watch


class Recording(TinyModel):
    """Remembers every image and caption that is encoded without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []
        watch(self, "image", lambda pixels, _: self.note(self.images, pixels))
        watch(self, "text", lambda tokens, _: self.note(self.texts, tokens.ids))

    @staticmethod
    def note(seen: list[Tensor], given: Tensor) -> None:
        if not torch.is_grad_enabled():
            seen += given


def passes(seen: list[Tensor], items: list[Tensor]) -> set[int]:
    """How often each of `items` was seen."""
    return {sum(torch.equal(one, item) for one in seen) for item in items}


@pytest.mark.parametrize("config", [{}, {"evaluation": "full"}, {"micro_batch_size": 3}])
@SHORT_RUN
def test_a_run_encodes_each_set_once_with_the_original_and_once_with_the_result(
    config, monkeypatch
):
    """Outside of training; evaluation, verdict, floor and cache share one pass."""
    holdout = pairs(9, seed=3)
    model = Recording()
    # GradCache encodes without a graph too: count those passes apart.
    counts: list[list[int]] = []

    def note(record: dict | None = None) -> None:
        counts.append([len(model.images), len(model.texts)])

    plain = run.run_steps
    monkeypatch.setattr(run, "run_steps", lambda *given, **more: note() or plain(*given, **more))
    erase(model, **{"holdout": holdout, "callback": note, "evaluation": "quick", **config})
    for column, seen in enumerate((model.images, model.texts)):
        before_training, after_training = counts[0][column], counts[-1][column]
        for name, items in {"forget": FORGET, "retain": RETAIN, "holdout": holdout}.items():
            values = [item[column] for item in items]
            assert passes(seen[:before_training], values) == {1}, f"original, {name}"
            assert passes(seen[after_training:], values) == {1}, f"result, {name}"


def test_features_are_those_of_the_model_row_by_row():
    model = TinyModel()
    items = pairs(7, seed=1)
    source = open_pairs(items, name="retain")
    encoder = PairEncoder(model, batch_size=3)
    rows = np.array([0, 2, 3, 6])
    found = encoder.pairs(source, rows, description="")
    pixels, ids = (torch.stack([items[row][side] for row in rows]) for side in (0, 1))
    with torch.no_grad():
        torch.testing.assert_close(found.image, model.encode_image(pixels))
        torch.testing.assert_close(found.first_text, model.encode_text(Tokens(ids)))
    assert found.rows.tolist() == rows.tolist()
    some = found.at(np.array([2, 5, 6]))
    assert some.rows.tolist() == [2, 6]
    assert torch.equal(some.image, found.image[[1, 3]])
    assert torch.equal(some.first_text, found.first_text[[1, 3]])


def test_equal_captions_are_encoded_once_and_all_captions_if_asked():
    model = Recording()
    model.text_tokenizer = lambda texts: Tokens(torch.tensor([[ord(t[0])] * 5 for t in texts]) % 50)
    images = [image for image, _ in pairs(5, seed=1)]
    captions = [["a", "b"], "b", ["c", "a"], "a", "d"]
    source = open_pairs(list(zip(images, captions, strict=True)), name="retain")
    found = PairEncoder(model, batch_size=2).pairs(
        source, np.arange(5), captions="all", description=""
    )
    assert len(model.texts) == len(found.captions) == 4
    named = [[found.captions[i] for i in rows] for rows in found.pair_text]
    assert named == [["a", "b"], ["b"], ["c", "a"], ["a"], ["d"]]
    assert found.first_captions == ["a", "b", "c", "a", "d"]


def test_modes_and_gradients_are_left_alone():
    model = TinyModel(dropout=0.5)
    model.module.train()
    model.module.text.eval()
    encoder = PairEncoder(model)
    source = open_pairs(pairs(4, seed=1), name="retain")
    first, second = (encoder.pairs(source, np.arange(4), description="") for _ in range(2))
    assert torch.equal(first.image, second.image), "Dropout is off"
    assert not first.image.requires_grad
    assert (model.module.image.training, model.module.text.training) == (True, False)
    assert torch.is_grad_enabled()


def test_precision_is_one_rule():
    model = TinyModel()
    source = open_pairs(pairs(9, seed=1), name="retain")
    exact = PairEncoder(model, precision="fp32").pairs(source, np.arange(9), description="")
    rough = PairEncoder(model, precision="bf16").pairs(source, np.arange(9), description="")
    assert PairEncoder(model).precision == "fp32", "auto on a CPU"
    assert rough.image.dtype == rough.text.dtype == torch.float32
    for one, other in ((exact.image, rough.image), (exact.text, rough.text)):
        assert 1e-5 < float((one - other).abs().max()) < 0.05


def test_unreadable_pairs_are_counted_named_and_an_error_if_all_are():
    items = pairs(4, seed=1)
    items[1][0][0, 0, 0] = float("nan")
    source = open_pairs(items, name="holdout")
    ledger = SkipLedger(4, max_skipped=0.5)
    encoder = PairEncoder(TinyModel(), ledger=ledger)
    with pytest.warns(UserWarning, match=r"holdout\[1\] \(image holds NaN"):
        found = encoder.pairs(source, np.arange(4), description="")
    assert found.rows.tolist() == [0, 2, 3]
    assert [skip.id for skip in found.skipped] == ["holdout[1]"] == [s.id for s in ledger.skips]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been named already
        with pytest.raises(InputError, match=r"`holdout`: none of its 1 pairs can be read.*NaN"):
            encoder.pairs(source, np.array([1]), description="")


def test_a_batch_that_does_not_fit_in_memory_is_encoded_in_parts():
    """There is memory for three images, or twelve texts."""

    def refuse(given, features):
        if len(features) > (12 if isinstance(given, Tokens) else 3):
            raise torch.OutOfMemoryError("too small")

    small = TinyModel()
    for side in ("image", "text"):
        watch(small, side, refuse)
    source, rows = open_pairs(pairs(21, seed=1), name="retain"), np.arange(21)
    encoders = [PairEncoder(model, batch_size=16) for model in (small, TinyModel())]
    found, expected = (each.pairs(source, rows, description="") for each in encoders)
    torch.testing.assert_close(found.image, expected.image)
    torch.testing.assert_close(found.first_text, expected.first_text)
