"""The sampler: passes are permutations, batches hold no row twice, steps depend on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterase.pairs.sampler import EMPHASIS, WINDOW_SHARDS, Sampler
from fasterase.seeds import Stream, generator

SIZES = {
    "n_forget": st.integers(1, 40),
    "n_retain": st.integers(1, 60),
    "forget_batch_size": st.integers(1, 50),
    "batch_size": st.integers(1, 70),
    "seed": st.integers(0, 2**40),
}


@given(sizes=st.fixed_dictionaries(SIZES))
@settings(max_examples=100, deadline=None)
def test_every_pass_over_the_forget_set_is_a_permutation(sizes):
    sampler = Sampler(**sizes)
    steps = sampler.steps_per_epoch
    assert steps == -(-sizes["n_forget"] // sizes["forget_batch_size"])
    for epoch in range(2):
        parts = [sampler.draw(epoch * steps + i).forget for i in range(steps)]
        assert sorted(np.concatenate(parts)) == list(range(sizes["n_forget"]))
        lengths = [len(part) for part in parts]
        assert max(lengths) <= sizes["forget_batch_size"]
        assert max(lengths) - min(lengths) <= 1


@given(sizes=st.fixed_dictionaries(SIZES))
@settings(max_examples=200, deadline=None)
def test_retain_batches_are_full_and_hold_no_row_twice(sizes):
    sampler = Sampler(**sizes)
    count = sizes["n_retain"]
    size = min(sizes["batch_size"], count)
    steps = 4 * count // size + 2
    parts = [sampler.draw(step).retain for step in range(steps)]
    for part in parts:
        assert len(part) == len(set(part)) == size
        assert set(part) <= set(range(count))
    drawn = np.concatenate(parts)
    if size <= count // 2:
        # Every pass draws every pair once.
        for number in range(len(drawn) // count):
            assert len(set(drawn[number * count : (number + 1) * count])) == count
    for taken in (0, 1, 2, steps // 2, steps):
        assert sampler.retain_pairs_drawn(taken) == len(set(drawn[: taken * size]))


@given(sizes=st.fixed_dictionaries(SIZES), data=st.data())
@settings(max_examples=100, deadline=None)
def test_batches_with_emphasised_rows_are_full_and_hold_no_row_twice(sizes, data):
    pool = np.sort(data.draw(st.permutations(range(sizes["n_retain"])))[1:])
    emphasised = np.array(data.draw(st.lists(st.sampled_from([*pool, -1]), unique=True)), np.int64)
    emphasised = np.sort(emphasised[emphasised >= 0])
    sampler = Sampler(**sizes, retain_rows=pool, emphasised=emphasised)
    parts = [sampler.draw(step).retain for step in range(len(pool))]
    for drawn in parts:
        assert len(drawn) == len(set(drawn)) == min(sizes["batch_size"], len(pool))
    assert {row for drawn in parts for row in drawn} == set(pool), "even a pair at a time"


@pytest.mark.parametrize("size", [20, 130])
def test_emphasised_rows_are_drawn_more_often_and_all_rows_equally(size):
    emphasised = np.arange(5, 200, 10)
    sampler = Sampler(
        *(1, 200),
        forget_batch_size=1,
        batch_size=size,
        seed=2,
        retain_rows=np.arange(200),
        emphasised=emphasised,
    )
    drawn = np.concatenate([sampler.draw(step).retain for step in range(400)])
    counts = np.bincount(drawn, minlength=200)
    others = np.delete(counts, emphasised)
    if size == 20:
        assert counts[emphasised].mean() / others.mean() == pytest.approx(EMPHASIS, rel=0.1)
    else:
        assert (counts[emphasised] == 400).all()  # in every batch
    assert np.ptp(others) <= 1
    assert np.ptp(counts[emphasised]) <= 1


@given(count=st.integers(2, 40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_of_a_small_set_every_pair_is_left_out_equally_often(count, data):
    size = data.draw(st.integers(count // 2 + 1, count))
    sampler = Sampler(1, count, forget_batch_size=1, batch_size=size, seed=3)
    parts = [sampler.draw(step).retain for step in range(count)]
    assert set(np.bincount(np.concatenate(parts), minlength=count)) == {size}


@pytest.mark.parametrize(("count", "size"), [(60, 15), (7, 7), (40, 20), (12, 1)])
def test_batches_that_divide_the_set_are_cut_from_plain_permutations(count, size):
    sampler = Sampler(1, count, forget_batch_size=1, batch_size=size, seed=5)
    for step in range(3 * count // size):
        number, part = divmod(step, count // size)
        order = generator(5, Stream.RETAIN_ORDER, number).permutation(count)
        assert np.array_equal(sampler.draw(step).retain, order[part * size : (part + 1) * size])


@given(sizes=st.fixed_dictionaries(SIZES), steps=st.lists(st.integers(0, 200), max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_step_depends_on_nothing_but_seed_and_number(sizes, steps):
    used = Sampler(**sizes)
    for step in steps:
        drawn, fresh = used.draw(step), Sampler(**sizes).draw(step)
        for one, other in zip(drawn, fresh, strict=True):
            assert np.array_equal(one, other)


def test_seeds_passes_and_sets_differ():
    sampler, other = (
        Sampler(30, 30, forget_batch_size=30, batch_size=30, seed=seed) for seed in (0, 1)
    )
    first, second = sampler.draw(0), sampler.draw(1)
    orders = {tuple(each) for each in (*first[:2], second.forget, other.draw(0).forget)}
    assert len(orders) == 4


def test_rows_of_remote_shards_are_shuffled_in_windows():
    shards = np.repeat(np.arange(3 * WINDOW_SHARDS), 10).astype(np.int32)
    sizes = {"forget_batch_size": 32, "batch_size": 16, "seed": 0}
    sampler = Sampler(32, len(shards), **sizes, retain_shards=shards)
    rows = np.concatenate([sampler.draw(step).retain for step in range(len(shards) // 16)])
    assert sorted(rows) == list(range(len(shards)))
    windows = shards[rows].reshape(3, -1)
    for window in windows:
        assert len(set(window)) == WINDOW_SHARDS
        assert np.abs(np.diff(window)).mean() > 5  # and not shard by shard
    again = Sampler(32, len(shards), **sizes, retain_shards=shards)
    assert np.array_equal(again.draw(25).retain, rows[25 * 16 : 26 * 16])


def test_few_remote_shards_are_drawn_as_local_ones():
    shards = np.repeat(np.arange(WINDOW_SHARDS), 4).astype(np.int32)
    pool = np.arange(3, 60)
    sizes = {"forget_batch_size": 8, "batch_size": 16, "seed": 1, "retain_rows": pool}
    samplers = [
        Sampler(len(shards), len(shards), **sizes, forget_shards=each, retain_shards=each)
        for each in (None, shards)
    ]
    for step in range(9):
        for one, other in zip(*(sampler.draw(step) for sampler in samplers), strict=True):
            assert np.array_equal(one, other)


def test_an_empty_set_draws_nothing():
    draw = Sampler(0, 5, forget_batch_size=2, batch_size=2, seed=0).draw(3)
    assert len(draw.forget) == 0
    assert len(draw.retain) == 2
    assert len(Sampler(5, 0, forget_batch_size=2, batch_size=2, seed=0).draw(3).retain) == 0
