"""Runs of the tiny tower in processes of their own, which may be killed at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
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
from tests.tiny_model import FORGET, TinyModel, erase, pairs

# Processes come out of a server without torch's threads, which do not survive a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.tiny_run"])

CONFIG = {"max_steps": 6, "save_every": 2}


def run(
    folder: Path,
    *,
    config: dict[str, Any],
    tower: dict[str, Any],
    n_retain: int,
    callback: Callable[[dict[str, Any]], object] | None = None,
) -> TinyModel:
    """One run with its files in `folder`; returns the erased tower.

    An automatic run erases a concept from a tower that knows it.
    """
    automatic = config.get("lr") == "auto"
    model = tiny_concepts.knowing_model() if automatic else TinyModel(**tower)
    forget = tiny_concepts.FORGET if automatic else FORGET
    retain = tiny_concepts.RETAIN if automatic else pairs(n_retain, seed=2)
    with warnings.catch_warnings():
        # A few steps on random weights forget nothing, and random captions are close to each other.
        warnings.filterwarnings("ignore", "verdict|retain: .* seem to name")
        options = {**CONFIG, **config, "output_dir": folder, "callback": callback}
        erase(model, forget, retain, **options)
    return model


def _die_at(place: str, number: int) -> None:
    """Make the `number`-th passage through `place` the last thing that this process does."""
    owner, name = {
        "optimiser step": (torch.optim.AdamW, "step"),
        "sweep block": (fasterase.original.store.FeatureStore, "put"),
        "checkpoint shard": (fasterase.engine.checkpoint, "save_file"),
        "checkpoint rename": (os, "replace"),
        "checkpoint removal": (shutil, "rmtree"),
        "history line": (fasterase.engine.history.HistoryFile, "append"),
    }[place]
    plain = getattr(owner, name)
    removal = name == "rmtree"
    passed = [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        # Folders of other kinds are removed too, such as those of files being written.
        counts = not removal or Path(args[0]).name.startswith("step-")
        passed[0] += counts
        if counts and passed[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(owner, name, dying)


def _like_a_program() -> None:
    torch.set_num_threads(1)
    # The server's children would have their data-loading workers made by the server.
    multiprocessing.set_start_method("fork", force=True)


def _child(folder: Path, weights: Path, die_at: tuple[str, int] | None, **options: Any) -> None:
    _like_a_program()
    if die_at is not None:
        _die_at(*die_at)
    torch.save(run(folder, **options).weights(), weights)


def _preempted(folder: Path) -> None:
    _like_a_program()
    os.setpgrp()

    def await_signal(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            (folder / "ready").touch()
            time.sleep(2)

    try:
        run(folder, config={"num_workers": 1}, tower={}, n_retain=20, callback=await_signal)
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


def in_process(
    folder: Path,
    *,
    die_at: tuple[str, int] | None = None,
    config: dict[str, Any] | None = None,
    tower: dict[str, Any] | None = None,
    n_retain: int = 20,
) -> dict[str, torch.Tensor]:
    """Weights after a run in a new process; a run that is to die must have died."""
    weights = folder.with_suffix(".pt")
    process = _CONTEXT.Process(
        target=_child,
        args=(folder, weights, die_at),
        kwargs={"config": config or {}, "tower": tower or {}, "n_retain": n_retain},
    )
    process.start()
    process.join(120)
    assert process.exitcode == (0 if die_at is None else -signal.SIGKILL), process.exitcode
    return {} if die_at is not None else torch.load(weights, weights_only=True)
