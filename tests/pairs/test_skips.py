"""When broken pairs are a warning and when an error."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterase.errors import InputError
from fasterase.pairs.skips import Skip, SkipLedger


def skips(*numbers):
    return [Skip(f"x[{n}]", "image is torn") for n in numbers]


def test_a_small_share_is_warned_of_once_by_name():
    ledger = SkipLedger(500)
    ledger.add((f"x[{n}]" for n in range(300)), skips(300, 301))
    for _ in range(50):  # the same pairs again do not count
        ledger.add((f"x[{n}]" for n in range(300)), skips(300))
    with pytest.warns(UserWarning, match=r"2 broken pairs.*x\[300\] \(image is torn\); x\[301\]"):
        ledger.warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger.warn()
    assert ledger.skips == skips(300, 301)


def test_too_many_are_an_error_that_names_them():
    with pytest.raises(InputError, match=r"2 of 24 pairs .*`max_skipped`.*x\[7\] \(image is torn"):
        SkipLedger(24).add([f"y[{n}]" for n in range(22)], skips(7, 8))


def test_a_single_one_in_a_small_set_is_a_warning_unless_none_is_accepted():
    ledger = SkipLedger(24)
    ledger.add([f"y[{n}]" for n in range(23)], skips(7))
    with pytest.warns(UserWarning, match=r"^1 broken pair is skipped: x\[7\]"):
        ledger.warn()
    with pytest.raises(InputError, match="1 of 24 pairs"):
        SkipLedger(24, max_skipped=0.0).add([f"y[{n}]" for n in range(23)], skips(7))


def test_a_large_set_is_not_stopped_by_its_first_batch():
    ledger = SkipLedger(100_000)
    ledger.add((f"y[{n}]" for n in range(100)), skips(*range(10)))
    with pytest.raises(InputError):
        ledger.add((), skips(11))


def test_the_share_can_be_set_and_long_lists_are_cut():
    SkipLedger(10, max_skipped=0.5).add(["a"], skips(1, 2, 3, 4, 5))
    with pytest.raises(InputError, match="and 5 more"):
        SkipLedger(10, max_skipped=0.0).add([], skips(*range(15)))


@given(st.lists(st.lists(st.integers(0, 60)), max_size=30))
def test_distinct_pairs_are_counted_exactly(batches):
    ledger = SkipLedger(0, max_skipped=1.0)
    for batch in batches:
        ledger.add([f"x[{n}]" for n in batch], [])
    ledger.max_skipped = 0
    count = len({n for batch in batches for n in batch})
    with pytest.raises(InputError, match=f"1 of {count + 1} pairs"):
        ledger.add([], skips(100))
