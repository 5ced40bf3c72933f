"""The signals that end a run: SIGTERM, SIGUSR1 and Ctrl-C, from its first moment to its last.

A signal raises `Stopped` wherever the run is, unless a block asks for patience: a training step is
finished first. A thread sees to it that a run which cannot be interrupted, such as one that waits
in a library's C code, ends all the same.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fasterase.errors import PreemptedError

log = logging.getLogger(__name__)

# Seconds from a signal until a run that does not end by itself is ended; after a second signal.
GRACE_SECONDS, SECOND_SECONDS = 7.0, 1.0
# Launchers and schedulers pass on a signal that has reached the ranks already.
ECHO_SECONDS = 1.0
_POLL_SECONDS = 0.25
# What is left to a rank whose launcher was killed.
ORPHAN_SECONDS = 3.0
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # variables of torchrun and deepspeed
PREEMPTED, INTERRUPTED, FAILED = 75, 130, 1


class Stopped(KeyboardInterrupt):
    """A signal ends the run here.

    It is no `Exception`, so that nothing takes it for damage or a broken pair. `fasterase.unlearn`
    makes it a `PreemptedError`, or of Ctrl-C a plain `KeyboardInterrupt`.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal_name(self.number)}. Run the same command again to continue."


def _numbers() -> list[int]:
    """Return the signals that end a run; Windows has no SIGUSR1."""
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def signal_name(number: int) -> str:
    """Return what messages call a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopRequest:
    """Whether a signal has asked this thread's run to end, and when it may."""

    is_run = False  # whether there is a run

    def __init__(self, last_words: Callable[[int], None] | None = None) -> None:
        self.number = 0  # of the first signal, if one came
        self.is_raised = False  # then the run is on its way out, and exchanges nothing more
        self.at_end = ExitStack()  # what is closed when the run ends
        self.idle: list[Any] = []  # worker processes that it keeps for later
        self.last_words = last_words  # called with the exit code before a process is ended by force
        self._error: Exception | None = None
        self._since = self._first = self._heard = 0.0
        self._patience = self._changed = 0.0
        self._end_by = math.inf
        self._poked = self._poke_bytes = 0
        self._is_over = self._is_answered = False
        self._pid = os.getpid()
        self._handlers: dict[int, Any] = {}
        self._echo = ECHO_SECONDS if "RANK" in os.environ else 0.0

    def check(self) -> None:
        """Raise `Stopped` if a signal came for which no block has patience."""
        if (self.number or self._error) and self._is_due():
            self.is_raised = True
            raise self.reason()

    def reason(self) -> BaseException:
        """Return what the run ends with."""
        return self._error or Stopped(self.number)

    @contextmanager
    def patience(self, seconds: float = math.inf) -> Iterator[None]:
        """Let the block go on for so many seconds after a signal; 0: it is raised at once."""
        before, self._patience = self._patience, seconds
        self._changed = time.monotonic()
        try:
            self.check()
            yield
        finally:
            self._patience, self._changed = before, time.monotonic()

    def pass_on(self, number: int) -> None:
        """Stop as if `number` had come; called from another thread, for another rank's signal."""
        if not (self.number or self._is_over):
            self._note(number)
            self._poke()

    def fail(self, error: Exception) -> None:
        """Raise an error in the run; called from another thread."""
        if self._error is None and not self._is_over:
            self._error, self._since = error, time.monotonic()
            self._poke()

    def answer(self) -> None:
        """Raise nothing more for the first signal: the run ends by itself, and exchanges go on."""
        self.is_raised, self._is_answered = False, True

    def finish(self) -> None:
        """Ignore signals from now on: the run has come to its end."""
        self._is_over = True

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle signals in the block, in the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._handlers = {number: signal.signal(number, self._handle) for number in _numbers()}
        # Written to by the interpreter at once, also while this thread is in C code.
        other = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader, other), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self.finish()
            signal.set_wakeup_fd(other)
            for number, handler in self._handlers.items():
                # None means that the handler was not set from Python, and cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            writer.close()
            watcher.join()
            reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that was forked inside the run
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_poke, self._poked = self._poked > 0, max(0, self._poked - 1)
        if self._is_over:
            return
        now, is_again = time.monotonic(), False
        if not is_poke:
            self._note(number)
            is_again = self._first > 0 and now - self._first >= self._echo
            self._first = self._first or now
        if is_again or self._is_due():
            self.is_raised = True
            raise self.reason()

    def _note(self, number: int) -> None:
        if not self.number:
            self._since = time.monotonic()
            self.number = number

    def _is_due(self) -> bool:
        is_known = self.is_raised or self._is_answered or self._is_over
        return not is_known and time.monotonic() - self._since >= self._patience

    def _poke(self) -> None:
        """Have the main thread look: a signal interrupts what it waits for."""
        if self._handlers and hasattr(signal, "pthread_kill"):
            self._poked += 1
            self._poke_bytes += 1
            main = threading.main_thread().ident or 0
            signal.pthread_kill(main, self.number or signal.SIGTERM)

    def _watch(self, reader: socket.socket, other: int) -> None:
        """End a process whose main thread does not come to it by itself."""
        launcher = 0
        if any(name in os.environ for name in _LAUNCHERS) or multiprocessing.parent_process():
            launcher = os.getppid()
        while True:
            waits = self.number or self._error or launcher
            reader.settimeout(_POLL_SECONDS if waits else None)
            data = b""
            with suppress(TimeoutError):
                data = reader.recv(64)
                if not data:
                    return
            if data and other != -1:
                with suppress(OSError):
                    os.write(other, data)
            for number in data:
                self._hear(number)
            if launcher and os.getppid() != launcher:
                launcher, self._end_by = 0, time.monotonic() + ORPHAN_SECONDS
                self.pass_on(signal.SIGTERM)
            if self.number or self._error:
                self._press()

    def _hear(self, number: int) -> None:
        """Count a signal, which the main thread may not get to see for a while."""
        if self._poke_bytes:
            self._poke_bytes -= 1
        elif number in self._handlers:
            self._note(number)
            now = time.monotonic()
            if self._heard and now - self._heard >= self._echo:
                self._end_by = min(self._end_by, now + SECOND_SECONDS)
            self._heard = self._heard or now

    def _press(self) -> None:
        """Have the main thread look once a block's patience is over; end the process in the end."""
        now, allowed = time.monotonic(), max(self._since + self._patience, self._changed)
        if self._is_due() and not self._poked:
            self._poke()
        if now > min(allowed + GRACE_SECONDS, self._end_by):
            self._end()

    def _end(self) -> None:
        # Ctrl-C in a notebook is not meant to end the notebook.
        if self._is_over or (self.number == signal.SIGINT and self.last_words is None):
            return
        code = INTERRUPTED if self.number == signal.SIGINT else PREEMPTED
        if self._error is not None:
            code = FAILED
        with suppress(Exception):
            if self.last_words is not None:
                self.last_words(code)
            print(f"fasterase: error: {self.reason()}", file=sys.stderr, flush=True)
        os._exit(code)


_of_thread = threading.local()


def current_stop() -> StopRequest:
    """Return the request of this thread's run; outside one, a request that nothing makes."""
    return getattr(_of_thread, "stop", None) or StopRequest()


@contextmanager
def handling_signals(last_words: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """Turn signals into the end of the run in the block; inside another such block, that one does.

    Schedulers announce the end of a job by SIGTERM, or by SIGUSR1 where they are told to. A second
    signal raises at once whatever the run does, and ends the process a second later. Outside the
    main thread, where Python allows no handlers, signals keep their usual effect.
    """
    outer = getattr(_of_thread, "stop", None)
    if outer is not None:
        outer.last_words = last_words or outer.last_words
        yield outer
        return
    stop = StopRequest(last_words)
    stop.is_run, _of_thread.stop = True, stop
    try:
        with ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(stop.handling())
            else:
                log.warning(
                    "This is not the main thread, which alone may handle signals: Ctrl-C or "
                    "SIGTERM will end this run without a checkpoint of its last step."
                )
            stack.enter_context(stop.at_end)
            yield stop
    finally:
        _of_thread.stop = None


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


def in_child() -> None:
    """Have a process that was made inside a run leave signals to its parent, and end with it."""
    _of_thread.stop = None
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process once its parent has died.

    `parent` is 0 where a server forked it: then nothing is done.
    """
    if sys.platform != "linux" or not parent:
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(FAILED)


def _forget_parent() -> None:
    # The parent would take a signal of its child for one of its own.
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
