"""Processes that load pairs, and what reading one of them does to the random generators."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fasterase.errors import InputError
from fasterase.pairs.items import Record
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator


def read_record(source: PairTable, row: int, seed: int, *position: int) -> Record:
    """Return a record; if the source is random, the global generators are seeded by position."""
    if source.stable:
        return source[row]
    with _seeded(seed, *position):
        return source[row]


@contextmanager
def _seeded(seed: int, *position: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators for the block; restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int(generator(seed, Stream.DATASET, *position).integers(2**32))
    random.seed(value)
    np.random.seed(value)
    # Not torch.manual_seed, which reseeds accelerators too.
    torch.random.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _LoadDataset(Dataset[Any]):
    """Maps a request to `load(request)`, or to the InputError that it raised."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._load(request)
        # A value rather than an exception, which DataLoader would wrap in a worker's traceback.
        except InputError as error:
            return error


def load_parallel(
    load: Callable[[Any], Any], requests: Iterable[Any], num_workers: int
) -> Iterator[Any]:
    """Yield `load(request)` for each request, in order.

    Args:
        load: picklable if there are workers; an `InputError` that it raises ends the loop.
        requests: made as they are asked for, a few ahead of the results if there are workers.
        num_workers: processes that load; 0: this one.
    """
    loader = DataLoader(
        _LoadDataset(load),
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        # A generator of its own; otherwise each loader would draw from the global one and change
        # Dropout.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    finally:
        # The loader stops its workers when its last reference is dropped.
        del batches


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that end a run, so that the main process can finish its step and save.

    A scheduler's SIGTERM and a terminal's Ctrl-C reach every process of the run. Only the first
    SIGTERM is ignored, so that the parent can still end a worker that hangs.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
