"""What is said of a run while it goes on: a live line for people, and few plain ones for a log."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import Any, TextIO, TypeVar

from tqdm import TqdmWarning, tqdm
from tqdm.asyncio import tqdm_asyncio

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets a notebook gets plain lines
    from tqdm.auto import tqdm as live_tqdm

T = TypeVar("T")

# In a log something is said of a phase that goes on once so many seconds were silent.
LOG_SECONDS = 30.0
# What is done sooner is not worth a line.
SHORT_SECONDS = 2.0

_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)
_spoken = -LOG_SECONDS  # when the last line was written
_outermost: Progress | None = None  # loops inside it let it speak


@contextmanager
def speaking(wanted: bool) -> Iterator[None]:
    """Say nothing in the block unless it is `wanted`."""
    token = _is_quiet.set(_is_quiet.get() or not wanted)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def say(message: str, *, since: float | None = None, least: float = 0.0) -> None:
    """Write a line, usually what a phase has found that began at `since` (`time.monotonic`).

    Of a phase of fewer seconds than `least` nothing is said. Captions in the message may hold what
    no terminal should be sent: that is left out.
    """
    global _spoken
    now = time.monotonic()
    if _may_speak() and (since is None or now - since >= least):
        took = "" if since is None else f" ({_clock(now - since)})"
        sys.stdout.flush()  # what was printed before stands before it in a file of both
        tqdm.write(f"fasterase: {printable(message)}{took}", file=_stream())
        _spoken = now


def printable(text: str) -> str:
    """Return text as one line, without what moves a cursor or turns the direction of writing."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def launched_rank() -> int:
    """Return this process's number before it has joined the others; 0 without a launcher."""
    import torch.distributed as dist  # a command that is wrong should not wait for torch

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


class Progress:
    """A loop that goes on. Iterating over it yields its items and counts them.

    A terminal or a notebook shows a bar, which vanishes in the end; a log gets a line whenever
    `LOG_SECONDS` were silent. Of loops inside each other the outermost speaks, of several processes
    the first.

    Args:
        total: how many things there are; None if that is not known.
        items: what to iterate over; None if the caller calls `update`.
        unit: what is counted, such as "pair".
        initial: how many were done before.
        delay: seconds before a bar is shown.
    """

    def __init__(
        self,
        description: str,
        *,
        total: int | None = None,
        items: Iterable[Any] | None = None,
        unit: str,
        initial: int = 0,
        delay: float = 0.0,
        shown: bool = True,
    ) -> None:
        total = length_hint(items) or None if total is None else total
        self._description, self._total, self._items, self._unit = description, total, items, unit
        self._count = self._initial = initial
        self._facts = ""
        self._shown, self._delay = shown and _may_speak(), delay
        self._bar: tqdm | None = None

    def update(self, count: int = 1, facts: Mapping[str, str] | None = None) -> None:
        """Count what is done; `facts` are told beside it."""
        self._count += count
        if facts:
            self._facts = "".join(f", {name} {text}" for name, text in facts.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts[2:], refresh=False)
            self._bar.update(count)
        elif self._shown:
            (_outermost or self)._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        is_due = now - _spoken >= LOG_SECONDS and now - self.began >= SHORT_SECONDS
        if is_due and self._bar is None:
            say(self._line(now - self.began))

    def _line(self, seconds: float) -> str:
        """Return a line such as "reading retain: 4 of 10 items (00:40, up to 01:00 left)"."""
        done, total = self._count - self._initial, self._total
        of, left = "", ""
        if total is not None:
            of = f" of {total:,}"
            left = f", up to {_clock(seconds * (total - self._count) / done)} left" if done else ""
        counted = f"{self._count:,}{of} {self._unit}{'' if (total or self._count) == 1 else 's'}"
        return f"{self._description}: {counted}{self._facts} ({_clock(seconds)}{left})"

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items or ():
                yield item
                self.update()

    def __enter__(self) -> Progress:
        global _outermost
        self.began = time.monotonic()
        if _outermost is not None or not self._shown:
            return self
        _outermost = self
        if live_tqdm is not tqdm_asyncio or sys.stderr.isatty():
            self._bar = live_tqdm(
                total=self._total,
                desc=self._description,
                unit=self._unit,
                initial=self._initial,
                leave=False,
                delay=self._delay,
            )
        return self

    def __exit__(self, *_: object) -> None:
        global _outermost
        if self._bar is not None:
            self._bar.close()
        if _outermost is self:
            _outermost = None


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


def _may_speak() -> bool:
    return not _is_quiet.get() and launched_rank() == 0


def _stream() -> TextIO:
    # A notebook shows what comes on stderr like an error.
    return sys.stdout if type(sys.stdout).__module__.startswith("ipykernel") else sys.stderr


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
