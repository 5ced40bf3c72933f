"""Run measurements in processes of their own: one at a time, or many in parallel."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from fasterase.errors import InputError
from fasterase.signals import end_with_parent

Job = TypeVar("Job", bound=Hashable)
Found = TypeVar("Found")


class MeasurementError(Exception):
    """A measurement cannot be made; the message gives the reason."""


def call_in_process(
    call: Callable[..., Any], *arguments: Any, seconds: float, preload: Sequence[str]
) -> Any:
    """Return `call(*arguments)`, computed in a new process with as many threads as this one.

    Args:
        call: a function of a module; it and its arguments are pickled.
        seconds: the process is killed after so long.
        preload: modules that the process shares with later ones.

    Raises:
        InputError: the call raised it.
        MeasurementError: it raised any other error, or its process died or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    # Children fork from a process that has imported torch but not computed: no pools, no threads.
    context.set_forkserver_preload([call.__module__, *preload])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(
        target=_send_result, args=(theirs, torch.get_num_threads(), call, arguments)
    )
    child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            child.kill()
            raise MeasurementError(f"took more than {seconds:g} s")
        found, why = ours.recv()
    except EOFError:
        child.join()
        raise MeasurementError(f"its process ended with code {child.exitcode}") from None
    finally:
        child.join()
        ours.close()
    if isinstance(why, InputError):
        raise why
    if why is not None:
        raise MeasurementError(why)
    return found


def _send_result(
    to: Connection, num_threads: int, call: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(num_threads)
    try:
        to.send((call(*arguments), None))
    except InputError as error:
        to.send((None, error))
    except Exception as error:
        to.send((None, describe_error(error)))


def describe_error(error: Exception) -> str:
    """Describe an error in one line."""
    if isinstance(error, MeasurementError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def call_all(
    call: Callable[..., Found],
    jobs: Iterable[Job],
    *arguments: Any,
    processes: int,
    describe: Callable[[Job], str] = str,
) -> dict[Job, Found]:
    """Return job -> `call(job, *arguments)`, computed in new processes of one thread each.

    Prints what `describe` says of a job as soon as it is done. On Linux, the processes end with
    this one, also where it is killed.
    """
    found: dict[Job, Found] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        processes, context, initializer=_prepare_worker, initargs=(os.getpid(),)
    )
    with pool:
        pending = {pool.submit(call, job, *arguments): job for job in jobs}
        for done in as_completed(pending):
            job = pending[done]
            found[job] = done.result()
            print(f"[{len(found)}/{len(pending)}] {describe(job)}", flush=True)
    return found


def _prepare_worker(parent: int) -> None:
    end_with_parent(parent)
    torch.set_num_threads(1)
