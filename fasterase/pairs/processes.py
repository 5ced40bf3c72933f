"""Processes that read and load pairs: how many there are, a pool of them, and data loaders."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from fasterase.errors import InputError
from fasterase.option_values import parse_value
from fasterase.parallel.ranks import ALONE, Ranks

# More are of no use: two or three cores feed the largest towers of a GPU.
MOST_PROCESSES = 16


def num_cpus() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def count_workers(num_workers: int | Literal["auto"], ranks: Ranks = ALONE) -> int:
    """Return how many processes of a rank load pairs.

    `"auto"` shares the cores that this process may use among the ranks of its host, and leaves one
    of each share to the rank itself; at most `MOST_PROCESSES`.

    Raises:
        InputError: `num_workers` is neither a whole number nor "auto".
    """
    num_workers = parse_value("num_workers", num_workers, int | Literal["auto"])
    if num_workers != "auto":
        return num_workers
    return max(0, min(num_cpus() // ranks.on_this_host - 1, MOST_PROCESSES))


def count_processes(items: int) -> int:
    """Return how many processes share the work on some shards; 1 for this one alone."""
    # Elsewhere a new process would import the caller's script again; a daemon may have none.
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    return min(items, MOST_PROCESSES, num_cpus()) if can_fork else 1


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of forked processes; what they have not begun is dropped after the block."""
    context = multiprocessing.get_context("fork")
    # They end at Ctrl-C at once and without a traceback: the main process is told too. What they
    # leave half done, such as the download of a shard, the next run resumes.
    at_once = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(workers, context, signal.signal, at_once) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


class _Loading(Dataset[Any]):
    """Maps a request to `load(request)`, or to the InputError that it raised.

    As an exception, DataLoader would wrap it in a worker's traceback.
    """

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._load(request)
        except InputError as error:
            return error


def load_parallel(
    load: Callable[[Any], Any], requests: Iterable[Any], num_workers: int
) -> Iterator[Any]:
    """Yield `load(request)` for each request, in order.

    Args:
        load: picklable if there are workers; an `InputError` that it raises ends the loop.
        requests: made as they are asked for, a few ahead of the results if there are workers.
        num_workers: processes that load; 0: this one.
    """
    loader = DataLoader(
        _Loading(load),
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        # A generator of its own; otherwise each loader would draw from the global one and change
        # Dropout.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )
    # The loop's iterator is the only one: the loader stops its workers when it is dropped.
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that end a run, which reach all of its processes: the main one saves.

    Only the first SIGTERM is ignored, so that the parent can still end a worker that hangs.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
