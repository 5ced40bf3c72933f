"""Run a measurement in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from fasterase.errors import InputError


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
