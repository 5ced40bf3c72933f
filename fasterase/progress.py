"""Progress bars: live in a terminal or a notebook, and a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

T = TypeVar("T")

# Seconds between two lines of one bar in a log.
LOG_SECONDS = 10.0
_LOG_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(
    description: str,
    *,
    total: int | None = None,
    items: Iterable[Any] | None = None,
    unit: str,
    initial: int = 0,
    leave: bool = True,
    delay: float = 0.0,
    shown: bool = True,
) -> tqdm:
    """Return a tqdm bar on stderr, with tqdm's own arguments.

    Args:
        description: what is going on.
        items: iterated over by the bar itself; None if the caller calls `update`.
        unit: what is counted, such as "pair".
        shown: False shows nothing.
    """
    common: dict[str, Any] = {
        "iterable": items,
        "total": total,
        "desc": description,
        "unit": unit,
        "initial": initial,
        "leave": leave,
        "disable": not shown,
    }
    # A notebook draws widgets; its stderr is no terminal either.
    if sys.stderr.isatty() or tqdm is not tqdm_asyncio:
        return tqdm(**common, delay=delay)
    return tqdm(
        **common,
        # A bar that will vanish need not leave a line for each time that it is quickly done.
        delay=delay if leave else max(delay, LOG_SECONDS),
        file=_Lines(sys.stderr),
        bar_format=_LOG_LINE,
        mininterval=LOG_SECONDS,
        miniters=1,  # tqdm's estimate of the steps until the next line is slow to notice a stall
    )


class WaitingShare:
    """The share of its time that a loop waits for its data; an item weighs 0.9 of the next.

    `str` of it is a percentage. Near 0 the device decides how fast the loop is, near 100 it is the
    loading of pairs, which more workers may speed up.
    """

    def __init__(self) -> None:
        self._waited = self._total = 0.0

    def note(self, waited: float, worked: float) -> None:
        """Count an item: seconds until it was there, and seconds of work on it."""
        self._waited = 0.9 * self._waited + waited
        self._total = 0.9 * self._total + waited + worked

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count what each took."""
        iterator = iter(items)
        came = time.perf_counter()
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.note(time.perf_counter() - asked, asked - came)
            came = time.perf_counter()
            yield item

    def __float__(self) -> float:
        return self._waited / self._total if self._total else 0.0

    def __str__(self) -> str:
        return f"{float(self):.0%}"


class _Lines:
    """A stream in which each state of a bar is a line of its own, not written over the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()
