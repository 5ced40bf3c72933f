"""Processes that read and load pairs: how many there are, and what is done when one dies."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import queue
import random
import shutil
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from fasterase.errors import FaseraseError, InputError
from fasterase.option_values import parse_value
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.signals import current_stop, end_with_parent, in_child

# More are of no use: two or three cores feed the largest towers of a GPU.
MOST_PROCESSES = 16
# Requests that each worker is given ahead.
AHEAD = 2
# Seconds without a result after which a worker counts as stalled. A remote shard may take minutes.
STALL_SECONDS = 300.0
SHARED_MEMORY = "/dev/shm"


def num_cpus() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def count_workers(num_workers: int | Literal["auto"], ranks: Ranks = ALONE) -> int:
    """Return how many processes of a rank load pairs; `InputError` for a number below 0.

    `"auto"` shares the cores that this process may use among the ranks of its host, and leaves one
    of each share to the rank itself; at most `MOST_PROCESSES`.
    """
    num_workers = parse_value("num_workers", num_workers, int | Literal["auto"])
    if num_workers != "auto":
        if num_workers < 0:
            raise InputError(f"num_workers={num_workers} must be 0 or more, or 'auto'.")
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

    Where a worker dies or stalls, fewer of them do the same work again; where the last one stalls,
    this process does. A warning says so.

    Args:
        load: picklable if there are workers and the system cannot fork; what it raises is raised.
        requests: made as they are asked for, a few ahead of the results if there are workers.
        num_workers: processes that load; 0: this one.
        item_bytes, on_this_host: see `count_that_fit`.

    Raises:
        FaseraseError: the last worker died where one had died before; its exit code is named.
    """
    workers = count_that_fit(num_workers, item_bytes, on_this_host=on_this_host)
    stop = current_stop()
    for item in _load_in_workers(load, iter(requests), workers):
        yield item
        stop.check()


def count_that_fit(count: int, item_bytes: int, *, on_this_host: int = 1) -> int:
    """Return how many workers the shared memory has room for, at most `count`; warn of fewer.

    A result takes `item_bytes`. Each worker has `AHEAD` of them ready, and one is in use.
    `on_this_host` processes share the memory in the same way.
    """
    if not count:
        return 0
    if multiprocessing.current_process().daemon:
        warnings.warn(
            f"num_workers={count}: this is a daemon process, which may start no others, so it "
            "loads the pairs itself.",
            stacklevel=2,
        )
        return 0
    if not os.path.isdir(SHARED_MEMORY) or not item_bytes:
        return count
    free = shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else 0
    fit = (free / on_this_host / item_bytes - 1) / AHEAD
    if fit >= count:
        return count
    fewer = max(0, math.floor(fit))
    needed = (AHEAD * count + 1) * item_bytes * on_this_host
    warnings.warn(
        f"num_workers={count}: {SHARED_MEMORY} has {tqdm.format_sizeof(free, 'B')} free, and "
        f"{AHEAD * count + 1} batches need {tqdm.format_sizeof(needed, 'B')}; going on with "
        f"{fewer}. Make it larger (docker run --shm-size=8g), or choose a smaller "
        "micro_batch_size.",
        stacklevel=2,
    )
    return fewer


def _load_in_workers(load: Callable[[Any], Any], todo: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield `load(request)` for each request, in order, from `count` workers, or fewer."""
    waiting = deque[Any]()  # asked for, not yet yielded
    fatal: Any = None  # what the last worker that died was loading
    while count:
        try:
            with _crew(count, load) as workers:
                yield from _through(workers, todo, waiting)
            return
        except _WorkerError as error:
            if error.died and count == 1 and waiting[0] is fatal:
                raise FaseraseError(
                    f"the process that loads pairs {error} twice on the same ones. It may lack "
                    "memory, or a library crash on them: num_workers=0 loads them in the main "
                    "process, and shows where."
                ) from None
            count = max(count // 2, int(error.died))
            fatal = waiting[0] if error.died else None
            warnings.warn(
                f"num_workers: a process that loads pairs {error}; going on with "
                f"{count or 'the main process alone'}. The pairs are the same.",
                stacklevel=2,
            )
    yield from map(load, [*waiting])
    yield from map(load, todo)


def _through(workers: list[_Worker], todo: Iterator[Any], waiting: deque[Any]) -> Iterator[Any]:
    """Yield results in order; `waiting` holds the requests that have none yet."""
    asked = deque[_Worker]()  # who answers the first, second, ... of these; the rest wait

    def ask(worker: _Worker) -> None:
        if len(asked) == len(waiting):
            waiting.extend(islice(todo, 1))
        if len(asked) < len(waiting):
            worker.send(("load", waiting[len(asked)]))
            asked.append(worker)

    for worker in workers * AHEAD:
        ask(worker)
    while asked:
        worker = asked.popleft()
        result = worker.receive()
        waiting.popleft()
        ask(worker)
        if isinstance(result, BaseException):
            raise result
        yield result


class _WorkerError(Exception):
    """A worker died or stalled."""

    def __init__(self, said: str, *, died: bool) -> None:
        super().__init__(said)
        self.died = died


class _Worker:
    """A process that answers requests one after the other."""

    def __init__(self, number: int, load: Callable[[Any], Any] | None) -> None:
        self.pipe, there = multiprocessing.Pipe()
        parent = 0 if multiprocessing.get_start_method() == "forkserver" else os.getpid()
        self.process = multiprocessing.Process(
            target=_work, args=(there, load, number, parent), daemon=True
        )
        self.process.start()
        there.close()

    def send(self, message: Any) -> None:
        # A worker that has died is noticed when its result is asked for.
        with suppress(OSError):
            self.pipe.send_bytes(pickle.dumps(message))

    def receive(self) -> Any:
        """Return the next result; raise `_WorkerError` if there will be none."""
        ready = wait([self.pipe, self.process.sentinel], STALL_SECONDS)
        if not ready:
            raise _WorkerError(f"gave nothing for {STALL_SECONDS:g} s", died=False)
        with suppress(EOFError, OSError, RuntimeError):
            if self.pipe in ready:
                return pickle.loads(self.pipe.recv_bytes())
        self.process.join(1.0)  # of one that has just died, the code is not there at once
        code = self.process.exitcode
        said = "could not hand over its result" if code is None else f"died (exit code {code})"
        raise _WorkerError(said, died=True)


@contextmanager
def _crew(count: int, load: Callable[[Any], Any]) -> Iterator[list[_Worker]]:
    """Yield workers for one loop, and end them.

    Forked ones begin with what is in memory. Others import everything anew, which takes seconds: in
    a run, those that have nothing left to do are kept for the next loop.
    """
    stop = current_stop()
    is_kept = stop.is_run and multiprocessing.get_start_method() != "fork"
    found = [crew for crew in stop.idle if len(crew[0]) == count]
    if found:
        stop.idle.remove(found[0])
        workers, end = found[0]
    else:
        workers = []
        # Also at the end of the interpreter, which would wait for them.
        end = Finalize(None, _end, args=[workers], exitpriority=100)
        stop.at_end.callback(end)
    try:
        while len(workers) < count:
            workers.append(_Worker(len(workers), None if is_kept else load))
        if is_kept:
            data = pickle.dumps(load)
            for worker in workers:
                worker.send(data)
        yield workers
    except BaseException:
        end()
        raise
    if is_kept:
        stop.idle.append((workers, end))
    else:
        end()


def _end(workers: list[_Worker]) -> None:
    """End workers at once: they hold nothing that would be lost."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(1.0)
        worker.pipe.close()


def _work(pipe: Connection, load: Any, number: int, parent: int) -> None:
    """Answer requests, in a process of its own, until the parent is gone."""
    _begin(parent)
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(number)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Requests are taken at once: a parent that waits to send one would not read results.
    threading.Thread(target=_take_in, args=(pipe, inbox), daemon=True).start()
    while True:
        message = inbox.get()
        if isinstance(message, bytes):
            load = pickle.loads(message)
        else:
            pipe.send_bytes(_answer(load, message[1]))


def _take_in(pipe: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(pickle.loads(pipe.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)  # the parent has gone


def _answer(load: Callable[[Any], Any], request: Any) -> bytes:
    """Return the pickled result, or the error that came of it."""
    try:
        result: Any = load(request)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            told = error
        except Exception:  # a class of the caller's that cannot be handed over
            told = FaseraseError(f"{type(error).__name__}: {error}")
        result = ExceptionWithTraceback(told, error.__traceback__)
    try:
        return bytes(ForkingPickler.dumps(result))  # tensors go into shared memory
    except (OSError, RuntimeError):  # it is full
        return pickle.dumps(result)
