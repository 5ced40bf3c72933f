"""The wall time of a run, over all its restarts."""

from __future__ import annotations

import time


class RunClock:
    """Counts the seconds of a run from now on, and adds those before it was interrupted.

    Attributes:
        earlier: seconds up to the checkpoint that this run resumes from.
    """

    def __init__(self) -> None:
        self.earlier = 0.0
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self.earlier + time.perf_counter() - self._started
