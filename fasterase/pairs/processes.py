"""Processes that read and load pairs: how many there are, a pool of them, and their results."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

from fasterase.option_values import parse_value
from fasterase.pairs.workers import count_that_fit, load_in_workers
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.signals import current_stop, end_with_parent, in_child

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
    """Yield a pool of forked processes, which are ended after an error in the block.

    What they leave half done, such as the download of a shard, the next run resumes.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            # `shutdown` would wait for what they are doing.
            for process in list(pool._processes.values()):
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    in_child()
    end_with_parent(parent)


def load_parallel(
    load: Callable[[Any], Any],
    requests: Iterable[Any],
    num_workers: int,
    *,
    item_bytes: int = 0,
    on_this_host: int = 1,
) -> Iterator[Any]:
    """Yield `load(request)` for each request, in order; a signal ends the run between two of them.

    Args:
        load: picklable if there are workers and the system cannot fork; what it raises is raised.
        requests: made as they are asked for, a few ahead of the results if there are workers.
        num_workers: processes that load; 0: this one.
        item_bytes, on_this_host: see `count_that_fit`.
    """
    workers = count_that_fit(num_workers, item_bytes, on_this_host=on_this_host)
    stop = current_stop()
    for item in load_in_workers(load, requests, workers) if workers else map(load, requests):
        yield item
        stop.check()
