"""The Triton backend on a machine without a GPU: its numbers under the interpreter, its refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fasterase.errors import InputError
from fasterase.ops.contrastive import api, available_backends, contrastive, explain_backend

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
new_triton = pytest.mark.skipif(VERSION < (3, 5), reason="the kernels need Triton 3.5")


@pytest.mark.slow
@new_triton
@pytest.mark.skipif(
    VERSION < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 needs numpy < 2.4",
)
@pytest.mark.parametrize("name", ["interpreted", "products"])
def test_numerics_under_the_interpreter(name):
    """In a process of their own: kernels are made for the interpreter when they are imported."""
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",  # of NumPy, which the interpreter computes rows of NaN and log(0) in
            "ignore::RuntimeWarning",
            f"tests/ops/contrastive_triton_{name}.py",
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@new_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_backend_is_refused():
    features = torch.zeros(4, 3)
    with pytest.raises(InputError, match="no CUDA device"):
        contrastive(features, features, 1.0, backend="triton")


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.4.1+git")
    features = torch.zeros(4, 3)
    with pytest.raises(InputError, match=r"kernels need 3\.5"):
        contrastive(features, features, 1.0, backend="triton")


def test_an_old_gpu_is_refused_and_auto_takes_torch_tiles(monkeypatch):
    """A T4 has too little shared memory for the tiles."""
    with FakeTensorMode():
        on_gpu = torch.empty(4, 3, device="cuda")
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for major in (7, 8):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda x=properties: x)
        assert ("triton" in available_backends()) == (major == 8)
    features = torch.zeros(4, 3)
    properties.major = 7
    with pytest.raises(InputError, match=r"compute capability 8\.0"):
        contrastive(features, features, 1.0, backend="triton")
    api._warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match=r"torch tiles .* compute capability 8\.0"):
        choice = explain_backend(on_gpu, on_gpu, 1.0)
    assert choice.name == "chunked"
    assert "compute capability 8.0" in choice.reason
