from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fasterase.evaluation import scores
from fasterase.evaluation.scores import (
    chance_position,
    find_position,
    join_positions,
    similarity_chunks,
)


def test_hit_is_the_share_of_orders_of_the_tied_that_put_a_right_one_among_the_first() -> None:
    # Two above, then four tied of which two are right: every order of the tied, counted out.
    similarity = torch.tensor([[0.9, 0.8, 0.5, 0.5, 0.5, 0.5, 0.1]])
    right = torch.tensor([[False, False, True, False, True, False, False]])
    found = find_position(similarity, right)
    for k in range(1, 8):
        orders = list(itertools.permutations([2, 3, 4, 5]))
        hits = sum(bool({2, 4} & set([0, 1, *order, 6][:k])) for order in orders)
        assert found.hit(k)[0] == pytest.approx(hits / len(orders))
    assert found.rank()[0] == pytest.approx(3 + 1.5)


def test_without_ties_hit_is_exact_and_rank_counts_from_one() -> None:
    torch.manual_seed(0)
    similarity = torch.rand(50, 20)
    target = torch.randint(20, (50,))
    found = find_position(similarity, torch.nn.functional.one_hot(target, 20).bool())
    order = similarity.argsort(dim=1, descending=True)
    places = (order == target[:, None]).nonzero()[:, 1].numpy()
    np.testing.assert_array_equal(found.rank(), places + 1)
    for k in (1, 5, 10, 30):
        np.testing.assert_allclose(found.hit(k), places < k)


def test_a_collapsed_model_scores_chance() -> None:
    right = torch.zeros(3, 40, dtype=torch.bool)
    right[0, :1] = right[1, 5:10] = right[2, :] = True
    # Noise of the size of fp32 rounding must not break the ties.
    found = find_position(0.3 + 1e-7 * torch.rand(3, 40), right)
    expected = chance_position(40, np.array([1, 5, 40]))
    for k in (1, 5, 10):
        np.testing.assert_allclose(found.hit(k), expected.hit(k))
    np.testing.assert_allclose(found.hit(5)[[0, 2]], [5 / 40, 1])


def test_chunks_cover_all_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", 30)
    torch.manual_seed(0)
    queries, candidates = torch.rand(11, 4), torch.rand(9, 4)
    slices, parts = zip(*similarity_chunks(queries, candidates), strict=True)
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    assert slices[-1] == slice(9, 11)
    torch.testing.assert_close(torch.cat(parts), queries @ candidates.T)


def test_joined_puts_chunks_one_after_the_other() -> None:
    torch.manual_seed(0)
    similarity = torch.rand(7, 5)
    right = torch.eye(7, 5).bool() | (torch.arange(7) >= 5)[:, None]
    whole = find_position(similarity, right)
    parts = join_positions(
        [find_position(similarity[:4], right[:4]), find_position(similarity[4:], right[4:])]
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
