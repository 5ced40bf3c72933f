"""Non-finite values, which skip a step, and signals, which end a run early."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fasterase.errors import LostRankError, NonFiniteError
from fasterase.objective import EraseLoss

log = logging.getLogger(__name__)

# In fp16 the loss scale finds its level by overflowing (it halves at each overflow, from 2^16), so
# that many steps may fail before such a run counts as broken.
LIMITS = {"fp32": 3, "bf16": 3, "fp16": 20}


class NonFiniteGuard:
    """Counts consecutive steps that could not be applied; too many depends on `precision`."""

    def __init__(self, precision: str) -> None:
        self.limit = LIMITS[precision]
        self.in_a_row = 0  # a resumed run sets it

    def record(self, term: str | None, *, step: int, ids: Sequence[str]) -> None:
        """Record a step: `term` is its first non-finite term, None if all were finite.

        Raises:
            NonFiniteError: too many steps in a row were not; names term, step and pair ids.
        """
        if term is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        log.warning("Step %d: %s is not finite; the step is not applied.", step, term)
        if self.in_a_row >= self.limit:
            shown = ", ".join(ids[:8]) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
            raise NonFiniteError(
                f"{term} is not finite at step {step}, for {self.in_a_row} steps in a row. The "
                f"model holds the weights of the last good step. Pairs of this step: {shown}. "
                "Try a lower lr, max_grad_norm=1.0 or precision='fp32', and look at these pairs.",
                term=term,
                step=step,
                pair_ids=ids,
            )


def non_finite_term(loss: EraseLoss) -> str | None:
    """Return the first loss term that is NaN or infinite, the total last."""
    for name in (*EraseLoss._fields[1:], "total"):
        if not math.isfinite(float(getattr(loss, name))):
            return name
    return None


class StopRequest:
    """The request of a signal to end the run."""

    number = 0  # of the signal


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM and SIGUSR1 into a request, so that no step is left half done.

    Schedulers announce the end of a job by SIGTERM, or by SIGUSR1 where they are told to. A second
    Ctrl-C raises at once. Outside the main thread, where Python allows no handlers, signals keep
    their usual effect.
    """
    stop = StopRequest()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.number = number

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                previous[number] = signal.signal(number, request)
    try:
        yield stop
    except LostRankError:
        # Launchers send SIGTERM as soon as one rank has died. This one ends by itself, once it has
        # said which.
        if previous:
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            # None means that the handler was not set from Python, and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def explaining_interrupts(output_dir: Path | None) -> Iterator[None]:
    """Add to a Ctrl-C between steps, such as while pairs are measured, how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args:
            raise
        raise KeyboardInterrupt(f"stopped by Ctrl-C. {how_to_continue(output_dir)}") from None


def how_to_continue(output_dir: Path | None) -> str:
    """Name the last checkpoint of a run and how to resume."""
    if output_dir is None:
        return "Nothing was saved; give an output_dir to make runs resumable."
    saved = "No step was saved yet"
    if any(output_dir.glob("checkpoints/step-*")):
        saved = f"A checkpoint is in {output_dir / 'checkpoints'}"
    return f"{saved}; make the same call or run the same command again to continue."
