"""One run per output folder: a lock that names the process which holds it."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fasterase.errors import InputError
from fasterase.files import check_writable, write_text

log = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
# Apart from the lock itself, which some systems do not let others read.
HOLDER_FILE = ".run.json"
# The data-loading workers of a killed run hold its lock until they notice, within five seconds.
ORPHAN_SECONDS = 20.0


@contextmanager
def lock_run(output_dir: Path | None) -> Iterator[None]:
    """Create `output_dir` and keep other runs out of it for the block; None does nothing.

    The lock is the operating system's, which takes it from a process that ends in whatever way. So
    nothing stale can be left, on another host neither.

    Raises:
        InputError: it cannot be written to; or another run holds it: names its process, host and
            start.
    """
    if output_dir is None:
        yield
        return
    check_writable(output_dir, argument="output_dir")
    # A lock per call, not per process: two threads are two runs.
    lock = FileLock(output_dir / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(timeout=ORPHAN_SECONDS if _is_holder_dead(output_dir) else 0)
    except Timeout as error:
        raise InputError(
            f"output_dir: {output_dir} is in use by {_name_holder(output_dir)}. Wait for that run "
            "to end, stop it, or give another output_dir."
        ) from error
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): do not start a second run there.", output_dir, error)
    holder = output_dir / HOLDER_FILE
    try:
        write_text(holder, json.dumps(_describe_self()) + "\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe_self() -> dict[str, object]:
    now = datetime.now().astimezone()
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": now.isoformat(" ", "seconds"),
    }


def _name_holder(output_dir: Path) -> str:
    holder = _read_holder(output_dir)
    if holder is None:
        return "another run"
    return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"


def _is_holder_dead(output_dir: Path) -> bool:
    holder = _read_holder(output_dir)
    if holder is None or holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass  # somebody else's process, or no process number
    return False


def _read_holder(output_dir: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads((output_dir / HOLDER_FILE).read_text(encoding="utf-8"))
    # There is none, or it has just begun.
    except (OSError, ValueError):
        return None
    return (
        holder if isinstance(holder, dict) and {"pid", "host", "started"} <= set(holder) else None
    )
