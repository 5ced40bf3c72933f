"""What a run needs to begin: a machine that can do it, agreeing ranks, a folder of its own."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.nn.modules.batchnorm import _BatchNorm

from fasterase.config import UnlearnConfig
from fasterase.engine.history import require_tracker
from fasterase.engine.optim import EIGHT_BIT, require_bitsandbytes, shards
from fasterase.errors import InputError, ResumeError
from fasterase.files import (
    check_creatable,
    check_replaceable,
    check_writable,
    remove_leftovers,
    write_text,
)
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.lora import parse_rank
from fasterase.numerals import counted
from fasterase.ops.contrastive.api import choose_backend
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import Ranks, is_running
from fasterase.parallel.zero import require_deepspeed

log = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
# Apart from the lock itself, which some systems do not let others read.
HOLDER_FILE = ".run.json"
# The workers of a killed run hold its lock until they have ended.
ORPHAN_SECONDS = 20.0


def check_arguments(config: object, callback: object, concept: object, request: object) -> None:
    """Raise `InputError` for an argument of `unlearn` that is not of its kind."""
    said = {
        "concept": (concept, "say in words what is forgotten, such as 'guide dogs'"),
        "request": (request, "name what asked for the erasure, such as 'REQ-17'"),
    }
    for name, (value, must) in said.items():
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise InputError(f"{name}={value!r} must {must}, or be None.")
    if not isinstance(config, UnlearnConfig | None):
        raise InputError(
            f"config: expected an UnlearnConfig, found {type(config).__name__}. Use "
            "UnlearnConfig(**fields) or UnlearnConfig.from_yaml(path)."
        )
    if callback is not None and not callable(callback):
        raise InputError(
            f"callback: expected a function of the step's record, found {type(callback).__name__}."
        )


def check_output_folder(output: Path | None) -> None:
    """Fail now rather than hours later if `output_dir` cannot be created or written to."""
    if output is not None:
        check_creatable(output, argument="output_dir")
        check_replaceable(output / "model", argument="output_dir")


def check_environment(config: UnlearnConfig) -> None:
    """Refuse options that this machine cannot honour, before anything is touched.

    Raises:
        InputError: `backend`, `deepspeed`, `tune` or `resume` cannot be as they are.
        MissingExtraError: a library behind `optimizer`, `deepspeed` or `report_to` is missing.
    """
    choose_backend(config.backend)
    if config.optimizer in EIGHT_BIT:
        require_bitsandbytes(config.optimizer)
    if config.report_to is not None:
        require_tracker(config.report_to)
        if config.output_dir is None:
            check_creatable(Path("runs"), argument=f"report_to={config.report_to!r}")
    if config.resume == "must" and config.output_dir is None:
        raise ResumeError(
            "resume='must' without output_dir: a run resumes from the checkpoints in its "
            "output_dir. Give the output_dir of the interrupted run, or resume='auto'."
        )
    if shards(config):
        require_deepspeed()
        if parse_rank(config.tune) is not None:
            raise InputError(
                f"tune={config.tune!r} with deepspeed: sharded weights cannot be adapted. Leave "
                "out deepspeed (of adapters, gradients and optimizer states are small), or choose "
                "another tune."
            )


def check_sets(retain: PairTable, concepts: Collection[str], config: UnlearnConfig) -> None:
    """Raise `InputError` for settings that cannot be with an empty retain set, or with concepts."""
    if concepts and (config.forget_loss != "similarity" or config.negatives != "own"):
        raise InputError(
            f"forget: several concepts ({', '.join(concepts)}) need forget_loss='similarity' and "
            "negatives='own'. Leave these out, or give one set to forget."
        )
    if len(retain):
        return
    if config.lr == "auto" or config.runs_until_forgotten or config.stop_when_forgotten:
        raise InputError(
            "`retain` is empty, so there is nothing to tell by whether the concept is forgotten, "
            "and what that costs. Give numbers for lr and epochs (or max_steps) and no "
            "stop_when_forgotten, or pairs to keep."
        )
    if not config.forget_weight:
        raise InputError(
            "`retain` is empty and forget_weight=0: nothing to train. Give pairs to keep, or a "
            "positive forget_weight."
        )


def check_same(seen: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse ranks that were given another model or other pairs than the first one."""
    everyone = ranks.gather_objects(seen)
    for rank, other in enumerate(everyone):
        differing = [name for name in seen if other[name] != everyone[0][name]]
        if differing:
            raise InputError(
                f"{' and '.join(differing)}: rank {rank} has others than rank 0. Every process "
                "must pass the same model (seed it before it is made, or load it) and the same "
                "pairs; the ranks divide each batch among themselves."
            )


def check_train_mode(model: DualEncoder, config: UnlearnConfig, ranks: Ranks) -> None:
    """Raise `InputError` for BatchNorm statistics that the ranks would take apart."""
    if not config.train_mode or ranks.world_size == 1:
        return
    if any(isinstance(part, _BatchNorm) for part in model.module.modules()):
        raise InputError(
            "train_mode=True with several processes: the BatchNorm statistics of each would be of "
            "its own pairs. Leave train_mode False, which freezes them, or use one process."
        )


def check_steps_left(config: UnlearnConfig, total_steps: int, *, taken: int) -> None:
    """Raise `ResumeError` where the run in `output_dir` has taken more steps than are asked for."""
    if taken <= total_steps:
        return
    asked = f"max_steps={total_steps}"
    if config.max_steps is None:
        asked = f"epochs={config.epochs} ({counted(total_steps, 'step')})"
    raise ResumeError(
        f"{asked}: the run in output_dir={config.output_dir!r} has taken "
        f"{counted(taken, 'step')} already. Give {taken} or more steps (max_steps) to continue it, "
        "choose another output_dir, or start afresh with resume='never'."
    )


@contextmanager
def lock_run(output_dir: Path | None) -> Iterator[None]:
    """Create `output_dir` and keep other runs out of it for the block; None does nothing.

    What a killed run has left there half written, such as a model, is removed.

    This is a lock of the operating system, released however the process ends, so no stale lock can
    remain, even on another host.

    Raises:
        InputError: it cannot be written to; or another run, which is named, holds it.
    """
    if output_dir is None:
        yield
        return
    check_writable(output_dir, argument="output_dir")
    holder_file, host = output_dir / HOLDER_FILE, socket.gethostname()
    holder = _read_holder(holder_file)
    is_orphaned = holder.get("host") == host and not is_running(holder["pid"])
    # A lock per call, not per process: two threads are two runs.
    lock = FileLock(output_dir / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(timeout=ORPHAN_SECONDS if is_orphaned else 0)
    except Timeout as error:
        holder = _read_holder(holder_file)
        name = "another run"
        if holder:
            name = f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
        raise InputError(
            f"output_dir: {output_dir} is in use by {name}. Wait for that run to end, stop it, or "
            "give another output_dir."
        ) from error
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): do not start a second run there.", output_dir, error)
    else:
        remove_leftovers(output_dir)
    started = datetime.now().astimezone().isoformat(" ", "seconds")
    try:
        itself = {"pid": os.getpid(), "host": host, "started": started}
        write_text(holder_file, json.dumps(itself) + "\n")
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def _read_holder(file: Path) -> dict[str, Any]:
    """Return process, host and start of the run that holds a folder; empty if it has not said."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(found, dict) and {"pid", "host", "started"} <= found.keys()
    return found if known and isinstance(found["pid"], int) else {}
