"""Launches processes as users do, and reads what `tests.parallel.job` leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# More than a test waits for: it stops the command before.
STEPS = 400
ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """Return the command that starts `ranks` processes of a module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(ranks), "-m", *arguments]


def environment() -> dict[str, str]:
    """Return an environment for small jobs: one thread each, and no GPU for DeepSpeed."""
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def run_cases(cases: list[str], folder: Path, *, ranks: int = 2, timeout: float = 400) -> None:
    """Run cases of `tests.parallel.job` on `ranks` processes."""
    done = subprocess.run(
        torchrun("tests.parallel.job", ",".join(cases), str(folder), ranks=ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def outcome(folder: Path, case: str, *, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{case}-{rank}.pt", weights_only=False)


def unlearn_command(inputs: Path, output: Path, **fields: Any) -> list[str]:
    """Return module and arguments of an erasure of the model and pairs in `inputs`."""
    settings = {
        "model": inputs / "model",
        "forget": inputs / "forget.csv",
        "retain": inputs / "retain.csv",
        "output_dir": output,
        "lr": 1e-3,
        "max_steps": STEPS,
        "batch_size": 8,
        "forget_batch_size": 4,
        "save_every": 5,
        "evaluation": "null",
        **fields,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return ["fasterase", "unlearn", *flags]
