"""Non-finite values, which skip a step, and signals, which end a run early."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fasterase.errors import LostRankError, NonFiniteError
from fasterase.objective import EraseLoss

log = logging.getLogger(__name__)

# In fp16 the loss scale finds its level by overflowing (it halves at each overflow, from 2^16), so
# that many steps may fail before such a run counts as broken.
LIMITS = {"fp32": 3, "bf16": 3, "fp16": 20}


class NonFiniteGuard:
    """Counts consecutive steps that could not be applied.

    Args:
        precision: compute dtype, which sets how many such steps are too many.

    Attributes:
        in_a_row: the count; a resumed run sets it.
    """

    def __init__(self, precision: str) -> None:
        self.limit = LIMITS[precision]
        self.in_a_row = 0

    def record(self, term: str | None, *, step: int, ids: Sequence[str]) -> None:
        """Record a step: `term` is its first non-finite term, None if all were finite.

        Raises:
            NonFiniteError: too many consecutive steps were not finite; names the term, the step and
                the pair ids.
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
    """Return the first loss term that is NaN or infinite."""
    for name in ("forget", "retain", "consistency", "anchor", "total"):
        if not math.isfinite(float(getattr(loss, name))):
            return name
    return None


# Schedulers announce the end of a job with them: SIGTERM, and SIGUSR1 where they are told to.
PREEMPTING = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class StopRequests:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a request, so that no step is left half done.

    While active, the first of them sets `number`; a second SIGINT raises at once. Outside the main
    thread, where Python allows no handlers, signals keep their usual effect. After the loss of
    another rank SIGTERM is ignored.

    Attributes:
        number: of the signal that requested the stop, else 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[signal.Signals, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *PREEMPTING):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            if kind is LostRankError and number == signal.SIGTERM:
                # Launchers send it as soon as one rank has died. This one ends by itself, once it
                # has said which.
                handler = signal.SIG_IGN
            # None means that the handler was not set from Python, and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def explaining_interrupts(output_dir: Path | None) -> Iterator[None]:
    """Add to a Ctrl-C between steps, such as while pairs are measured, how to go on.

    Raises:
        KeyboardInterrupt: as the block did, with that message if it had none.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args:
            raise
        folder = None if output_dir is None else output_dir / "checkpoints"
        raise KeyboardInterrupt(f"stopped by Ctrl-C. {how_to_continue(folder)}") from None


def how_to_continue(checkpoints: Path | None) -> str:
    """Name the last checkpoint and how to resume."""
    if checkpoints is None:
        return "Nothing was saved; give an output_dir to make runs resumable."
    if any(checkpoints.glob("step-*")):
        saved = f"A checkpoint is in {checkpoints}"
    else:
        saved = "No step was saved yet"
    return f"{saved}; make the same call or run the same command again to continue."
