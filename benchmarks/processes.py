"""Run a measurement in a process of its own, and measure the peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


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
        MeasurementError: the call raised an error, or its process died or took too long.
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
    if why is not None:
        raise MeasurementError(why)
    return found


def _send_result(
    to: Connection, num_threads: int, call: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(num_threads)
    try:
        to.send((call(*arguments), None))
    except Exception as error:
        to.send((None, describe_error(error)))


def describe_error(error: Exception) -> str:
    """Describe an error in one line."""
    if isinstance(error, MeasurementError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


class PeakMemory:
    """Measures the peak memory of what follows, above what is in use when it is made.

    On a GPU this is what torch's allocator counts. On a CPU it is resident memory, which earlier
    peaks of the process would hide: call it in a process of its own.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS
        self._before = proc_bytes("self/status", "VmRSS")

    def bytes(self) -> int:
        """Return the peak so far."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return proc_bytes("self/status", "VmHWM") - self._before


def proc_bytes(file: str, field: str) -> int:
    """Return a size from a file of /proc.

    Raises:
        LookupError: the file has no such field.
    """
    text = (Path("/proc") / file).read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise LookupError(f"/proc/{file} has no line {field}")
    return int(found[1]) * 1024
