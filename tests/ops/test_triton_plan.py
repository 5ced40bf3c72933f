"""Groups by pairs and strips of G: each row of each group once, in memory of the stated size."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from fasterase.ops.contrastive.triton_plan import (
    count_slots,
    pairs_of_groups,
    plan_strips,
    strip_stride,
)


@pytest.mark.parametrize("groups", [(5,), (5, 1), (1, 2, 3), (1, 2, 3, 4)])
def test_pairs_cover_the_groups_in_order(groups):
    pairs = list(pairs_of_groups(groups))
    assert len(pairs) == -(-len(groups) // 2)
    assert [n for pair in pairs for n in pair.sizes if n] == list(groups)
    assert [pair.rows.start for pair in pairs] == [0, *(pair.rows.stop for pair in pairs[:-1])]
    assert pairs[-1].rows.stop == sum(groups)
    assert pairs[-1].groups.stop == len(groups)


@pytest.mark.parametrize("sizes", [(300, 0), (300, 70), (70, 300), (1, 1000)])
@pytest.mark.parametrize("elements", [0, 40_000, 10**9])
def test_strips_cover_every_row_once(sizes, elements):
    launches = plan_strips(sizes, elements, 32)
    for group, n in enumerate(sizes):
        strips = [strips[group] for strips in launches if strips[group].num_rows]
        rows = [row for strip in strips for row in range(strip.first, strip.first + strip.num_rows)]
        assert rows == list(range(n))
        assert all(strip.first % 32 == 0 for strip in strips)
    used = [sum(s.num_rows * strip_stride(s.n) for s in strips) for strips in launches]
    assert max(used) <= max(elements, 32 * strip_stride(max(sizes)))
    if elements == 10**9:
        assert len(launches) == 1


def test_slots_are_few():
    assert [count_slots(n, 128) for n in (0, 1, 128, 129, 4096, 4097, 2**20)] == [
        *(0, 1, 1, 2, 32, 17, 32)
    ]
