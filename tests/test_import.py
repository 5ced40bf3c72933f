"""`import fasterase` is light, and every public name can be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fasterase

HEAVY = [
    *("datasets", "deepspeed", "matplotlib", "open_clip", "sklearn", "torchvision"),
    *("transformers", "webdataset"),
]


def _run(code: str) -> str:
    """What a fresh interpreter prints that finds fasterase where this one does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fasterase.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


def test_all_public_names_are_light():
    # CPU time, so that other work on the machine does not count.
    found = _run(
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "import fasterase\n"
        "names = [getattr(fasterase, name) for name in fasterase.__all__]\n"
        "spent = time.process_time() - start\n"
        f"print(spent, *[name for name in {HEAVY} if name in sys.modules])"
    ).split()
    assert found[1:] == []
    assert float(found[0]) < 1.0


def test_import_alone_needs_no_torch():
    assert _run("import sys, fasterase; print('torch' in sys.modules)") == "False"


def test_contract_names():
    assert set(fasterase.__all__) <= set(dir(fasterase))
    contract = {
        *("unlearn", "UnlearnConfig", "UnlearnResult", "erase_loss", "EraseLoss"),
        *("contrastive", "Contrastive", "evaluate", "Evaluation", "split"),
        *("available_backends", "explain_backend", "FaseraseError"),
    }
    assert contract <= set(fasterase.__all__)
    # fasterase.pairs.split and the like must not shadow the functions of these names.
    assert all(callable(getattr(fasterase, name)) for name in contract)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        _ = fasterase.forget
