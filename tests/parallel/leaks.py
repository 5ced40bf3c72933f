"""Erasures in a process group of the caller's: each rank checks that calls leave nothing behind.

python -m torch.distributed.run --nproc-per-node 2 -m tests.parallel.leaks
"""

from __future__ import annotations

import os
import time
import warnings

import torch
import torch.distributed as dist

from tests.tiny_model import erase


def counts() -> list[int]:
    """Return how many open files and threads this process has, once threads have ended."""
    time.sleep(1)
    return [len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    erase()
    before = counts()
    for _ in range(3):
        erase()
    after = counts()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
