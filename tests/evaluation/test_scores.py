from __future__ import annotations

import itertools

import pytest
import torch

from fasterase.evaluation.scores import find_position


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
