"""Runs of the tiny tower in processes of their own, which may be killed at a chosen moment."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # The first optimiser step would import it, in every process anew.

import fasterase.api
import fasterase.engine.checkpoint
import fasterase.engine.history
import fasterase.original.store
from fasterase.errors import PreemptedError
from tests import tiny_concepts
from tests.tiny_concepts import knowing_model
from tests.tiny_model import FORGET, TinyModel, erase, pairs

# Processes come out of a server without torch's threads, which do not survive a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.tiny_run"])

CONFIG = {"max_steps": 6, "save_every": 2}


def _run(
    folder: Path, *, tower: Any = None, n_retain: int = 20, callback: Any = None, **config: Any
) -> TinyModel:
    """One run with its files in `folder`; returns the erased tower.

    An automatic run erases a concept from a tower that knows it.
    """
    torch.set_num_threads(1)
    # The server's children would have their data-loading workers made by the server.
    multiprocessing.set_start_method("fork", force=True)
    # A few steps on random weights forget nothing, and random captions are close to each other.
    warnings.filterwarnings("ignore", "verdict|retain: .* seem to name")
    model, forget, retain = TinyModel(**(tower or {})), FORGET, pairs(n_retain, seed=2)
    if config.get("lr") == "auto":
        model, forget, retain = knowing_model(), tiny_concepts.FORGET, tiny_concepts.RETAIN
    erase(model, forget, retain, callback=callback, **{**CONFIG, "output_dir": folder, **config})
    return model


def _die_at(moment: str) -> None:
    """Make a passage through a place, such as "history line 3", the last act of this process."""
    place, _, number = moment.rpartition(" ")
    owner, name = {
        "optimiser step": (torch.optim.AdamW, "step"),
        "sweep block": (fasterase.original.store.FeatureStore, "put"),
        "checkpoint shard": (fasterase.engine.checkpoint, "save_file"),
        "checkpoint removal": (shutil, "rmtree"),
        "history line": (fasterase.engine.history.HistoryFile, "append"),
    }[place]
    plain = getattr(owner, name)
    passages = itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        # Folders of other kinds are removed too, such as those of files being written.
        counts = name != "rmtree" or Path(args[0]).name.startswith("step-")
        if counts and next(passages) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(owner, name, dying)


def _child(folder: Path, weights: Path, die_at: str | None, options: dict[str, Any]) -> None:
    if die_at is not None:
        _die_at(die_at)
    torch.save(_run(folder, **options).weights(), weights)


def in_process(folder: Path, die_at: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Weights after a run in a new process; a run that is to die must have died."""
    weights = folder.with_suffix(".pt")
    process = _CONTEXT.Process(target=_child, args=(folder, weights, die_at, options))
    process.start()
    process.join(120)
    assert process.exitcode == (0 if die_at is None else -signal.SIGKILL), process.exitcode
    return {} if die_at is not None else torch.load(weights, weights_only=True)


def _preempted(folder: Path) -> None:
    os.setpgrp()

    def await_signal(record: Any) -> None:
        if record["step"] == 2:
            (folder / "ready").touch()
            time.sleep(2)

    try:
        _run(folder, num_workers=1, callback=await_signal)
    except PreemptedError:
        raise SystemExit(75) from None


def preempted_with_workers(folder: Path) -> int:
    """Exit status, 75 for a clean stop, of a run whose data-loading worker got the SIGTERM too.

    Sent from here: a worker takes one from its own parent for an orderly end.
    """
    process = _CONTEXT.Process(target=_preempted, args=(folder,))
    process.start()
    while process.is_alive() and not (folder / "ready").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(120)
    return process.exitcode
