"""Processes that read and load pairs: how many there are, and a pool of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Literal

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
    with ProcessPoolExecutor(workers, context, initializer=_end_at_interrupts) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _end_at_interrupts() -> None:
    """End at Ctrl-C at once and without a traceback: the main process is told too.

    What a worker leaves half done, such as the download of a shard, the next run resumes.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
