"""Strips of G: each row once, in memory of the stated size."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from fasterase.ops.contrastive.triton_plan import (
    count_slots,
    plan_strips,
    strip_stride,
)


@pytest.mark.parametrize("n", [1, 300, 1000])
@pytest.mark.parametrize("elements", [0, 40_000, 10**9])
def test_strips_cover_every_row_once(n, elements):
    strips = plan_strips(n, elements, 32)
    assert [row for rows in strips for row in range(n)[rows]] == list(range(n))
    assert all(rows.start % 32 == 0 for rows in strips)
    longest = max(rows.stop - rows.start for rows in strips)
    assert longest == strips[0].stop
    assert longest * strip_stride(n) <= max(elements, 32 * strip_stride(n))
    assert elements < 10**9 or len(strips) == 1


def test_strips_are_equally_long():
    """12,000 rows of 11,136: in two, the second would fill a fraction of a GPU."""
    assert plan_strips(12_000, 2**27, 128) == [slice(0, 6016), slice(6016, 12_000)]


def test_slots_are_few():
    assert [count_slots(n, 128) for n in (0, 1, 128, 129, 4096, 4097, 2**20)] == [
        *(0, 1, 1, 2, 32, 17, 32)
    ]
