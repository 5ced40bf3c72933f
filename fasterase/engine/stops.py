"""Non-finite values, which skip a step, and how a run says that a signal has ended it."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fasterase.errors import NonFiniteError, PreemptedError
from fasterase.objective import EraseLoss
from fasterase.signals import signal_name

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


def non_finite_term(terms: Mapping[str, float]) -> str | None:
    """Return the first term of an `EraseLoss` that is NaN or infinite, the total last."""
    names = (*EraseLoss._fields[1:], "total")
    return next((name for name in names if not math.isfinite(terms[name])), None)


@contextmanager
def explaining_interrupts(advice: Callable[[], str]) -> Iterator[None]:
    """Turn what a signal raised into the error of `stop_error`, which says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args:
            raise
        raise stop_error(getattr(error, "number", signal.SIGINT), f". {advice()}") from None


def stop_error(number: int, said: str) -> BaseException:
    """Return the error of a run that a signal ends: PreemptedError; of Ctrl-C KeyboardInterrupt."""
    kind = KeyboardInterrupt if number == signal.SIGINT else PreemptedError
    return kind(f"stopped by {signal_name(number)}{said}")


def how_to_continue(output_dir: Path | None) -> str:
    """Name the last checkpoint of a run and how to resume."""
    if output_dir is None:
        return "Nothing was saved; give an output_dir to make runs resumable."
    saved = "No step was saved yet"
    if any(output_dir.glob("checkpoints/step-*")):
        saved = f"A checkpoint is in {output_dir / 'checkpoints'}"
    return f"{saved}; make the same call or run the same command again to continue."
