"""The command line with a place at which it hangs, as disks, servers and libraries make it.

    python -m tests.parallel.stalled PLACE MARK unlearn --model ...

touches MARK-RANK on the way in, on rank `STALLED_RANK` alone if that variable is set.
"""

from __future__ import annotations

import ctypes
import os
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

from fasterase.signals import handling_signals

# Name of what hangs when it is called for the given time.
PLACES = {
    "opening": ("fasterase.api.open_sets", 1),
    "indexing": ("fasterase.pairs.read_tars._read_shard", 1),
    "encoding": ("fasterase.original.store.FeatureStore.put", 2),
    "loading": ("fasterase.pairs.batches._Reader.__call__", 1),
    "loading a step": ("fasterase.pairs.batches._Reader._read", 40),
    "a step": ("fasterase.engine.loss.StepLoss.pairs", 4),
    "a library": ("fasterase.original.store.FeatureStore.put", 2),
    "measuring": ("fasterase.evaluation.evaluator.Evaluator.measure", 1),
    "saving": ("fasterase.result.UnlearnResult.save", 1),
}


def hang(place: str) -> None:
    if place == "a library":  # in C code, which no signal interrupts
        mutex = ctypes.create_string_buffer(256)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    time.sleep(600)


def patch(place: str, mark: str) -> None:
    path, call = PLACES[place]
    plain, count = pkgutil.resolve_name(path), 0
    owner, _, name = path.rpartition(".")
    rank = os.environ.get("RANK", "0")

    def hanging(*given: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count >= call and os.environ.get("STALLED_RANK", rank) == rank:
            Path(f"{mark}-{rank}").touch()
            hang(place)
        return plain(*given, **options)

    setattr(pkgutil.resolve_name(owner), name, hanging)


def main() -> int:
    place, mark, *arguments = sys.argv[1:]
    with handling_signals():  # imports take seconds
        import fasterase.cli
        import fasterase.pairs.read_tars

        # Small shards are indexed by several processes too.
        fasterase.pairs.read_tars.KEPT_BYTES = 0
        if place != "nowhere":
            patch(place, mark)
        return fasterase.cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
