"""Workers that die, stall, find no shared memory or are none: the results are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import namedtuple
from functools import partial
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from fasterase.errors import FaseraseError, InputError
from fasterase.pairs import processes as workers
from fasterase.pairs.processes import load_parallel, process_pool
from fasterase.parallel.ranks import is_running
from fasterase.signals import handling_signals
from tests.marks import SHORT_RUN
from tests.tiny_model import TinyModel, erase, same_weights

HERE = os.getpid()
REQUESTS = [torch.full((3,), i) for i in range(9)]


def loaded(load, count=2, **options):
    return [int(each.sum()) for each in load_parallel(load, iter(REQUESTS), count, **options)]


def triple(request, *, harm=None, at=4, once=None):
    """Three times a number, in shared memory; `harm` is done to a worker that comes to `at`."""
    is_there = int(request[0]) == at and os.getpid() != HERE
    if harm is not None and is_there and not (once and once.exists()):
        if once:
            once.touch()
        harm()
    return request * 3


def die():
    os.kill(os.getpid(), signal.SIGKILL)


EXPECTED = [9 * i for i in range(9)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_worker_that_dies_is_replaced(tmp_path, count):
    harmed = partial(triple, harm=die, once=tmp_path / "died")
    # It may take what it sent just before along with it.
    lost = r"(died \(exit code -9\)|could not hand over its result)"
    with pytest.warns(UserWarning, match=rf"{lost}; going on with 1. The pairs are"):
        assert loaded(harmed, count) == EXPECTED


def test_the_last_worker_that_dies_again_is_an_error():
    said = r"died \(exit code -9\) twice on the same ones. .*num_workers=0 loads them"
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(FaseraseError, match=said),
    ):
        loaded(partial(triple, harm=die))


def test_a_worker_that_stalls_leaves_the_work_to_this_process(monkeypatch):
    monkeypatch.setattr(workers, "STALL_SECONDS", 0.3)
    said = "gave nothing for 0.3 s; going on with the main process alone"
    with pytest.warns(UserWarning, match=said):
        assert loaded(partial(triple, harm=partial(time.sleep, 600)), 1) == EXPECTED


def test_a_full_shared_memory_is_done_without(monkeypatch):
    def refuse(value):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(ForkingPickler, "dumps", refuse)
    assert loaded(triple) == EXPECTED


@pytest.mark.parametrize(
    ("free_mb", "ranks", "fit"), [(100, 1, 4), (64, 1, 2), (64, 2, 1), (20, 1, 0)]
)
def test_workers_are_counted_against_the_shared_memory_beforehand(
    monkeypatch, tmp_path, free_mb, ranks, fit
):
    usage = namedtuple("usage", "total used free")(0, 0, free_mb * 10**6)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path))
    if fit == 4:
        assert workers.count_that_fit(4, 10**7, on_this_host=ranks) == 4
        return
    needed = "90.0MB" if ranks == 1 else "180MB"
    said = rf"num_workers=4: .* has {free_mb}.0MB free, and 9 batches need {needed}; .*with {fit}"
    with pytest.warns(UserWarning, match=said):
        assert workers.count_that_fit(4, 10**7, on_this_host=ranks) == fit
    with pytest.warns(UserWarning, match=said):
        assert loaded(triple, 4, item_bytes=10**7, on_this_host=ranks) == EXPECTED


def test_large_requests_and_results_do_not_wait_for_each_other(monkeypatch):
    """By value, both are larger than what a pipe holds."""
    monkeypatch.setattr(ForkingPickler, "dumps", lambda value: workers.pickle.dumps(value))
    large = [torch.full((300_000,), i).numpy() for i in range(5)]
    found = load_parallel(partial(max, key=id), ([each] for each in large), 1)
    assert [int(each[0]) for each in found] == [0, 1, 2, 3, 4]


def test_errors_of_a_dataset_come_with_their_traceback():
    def fail():
        raise InputError("retain[4]: too bright")

    with pytest.raises(InputError, match=r"^retain\[4\]: too bright$") as caught:
        loaded(partial(triple, harm=fail))
    assert "in triple" in str(caught.value.__cause__)


class TwoPartError(Exception):
    """Cannot be unpickled: its arguments are not those of `__init__`."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def test_an_error_that_cannot_be_handed_over_is_told():
    def fail():
        raise TwoPartError("page 3", "torn")

    with pytest.raises(FaseraseError, match="TwoPartError: page 3: torn"):
        loaded(partial(triple, harm=fail))


def in_daemon(results):
    with pytest.warns(UserWarning, match="num_workers=2: this is a daemon process"):
        results.put(loaded(triple))


def test_a_daemon_process_loads_by_itself():
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=in_daemon, args=(results,), daemon=True)
    process.start()
    assert results.get(timeout=30) == EXPECTED
    process.join()


def pids_of_children(kind, pipe):
    """Start workers of a kind that hang, tell who they are, and wait to be killed."""
    if kind == "index":
        with process_pool(2) as pool:
            found = [pool.submit(time.sleep, 600) for _ in range(2)]
            pipe.send(list(pool._processes))
            found[0].result()
    else:
        with workers._crew(2, time.sleep) as crew:
            for worker in crew:
                worker.send(("load", 600))
            pipe.send([worker.process.pid for worker in crew])
            time.sleep(600)


@pytest.mark.parametrize("kind", ["index", "loader"])
def test_workers_do_not_outlive_a_killed_parent(kind):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=pids_of_children, args=(kind, there))
    process.start()
    pids = here.recv()
    assert len(pids) == 2
    time.sleep(0.3)  # until they hang
    assert all(map(is_running, pids))
    process.kill()
    until = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.join()


@pytest.mark.slow
@SHORT_RUN
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_are_kept_until_the_run_ends(monkeypatch, method):
    started = []

    class Counted(workers._Worker):
        def __init__(self, *given):
            super().__init__(*given)
            started.append(self.process)

    monkeypatch.setattr(workers, "_Worker", Counted)
    before, forked, kept = multiprocessing.get_start_method(), TinyModel(), TinyModel()
    options = {"num_workers": 1, "stop_when_forgotten": True, "max_steps": 4}
    erase(forked, **options)
    assert len(started) > 4
    started.clear()
    multiprocessing.set_start_method(method, force=True)
    try:
        with handling_signals():
            erase(kept, **options)
            erase(TinyModel(), **options)
            assert 1 <= len(started) <= 3  # training ends before its loader has
            assert any(process.is_alive() for process in started)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert not any(process.is_alive() for process in started)
    assert same_weights(forked.weights(), kept.weights())
