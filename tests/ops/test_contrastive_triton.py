"""The Triton backend on a machine without a GPU: its numbers under the interpreter, its refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasterase.errors import InputError
from fasterase.ops.contrastive import contrastive

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_numerics_under_the_interpreter():
    """In a process of their own: kernels are made for the interpreter when they are imported."""
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops/contrastive_triton_interpreted.py",
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_backend_is_refused():
    features = torch.zeros(4, 3)
    with pytest.raises(InputError, match="no CUDA device"):
        contrastive(features, features, 1.0, backend="triton")


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.4.1+git")
    features = torch.zeros(4, 3)
    with pytest.raises(InputError, match="kernels need"):
        contrastive(features, features, 1.0, backend="triton")
