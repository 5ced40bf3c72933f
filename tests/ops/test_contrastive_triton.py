"""The numbers of the Triton kernels on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

try:
    import triton
except ImportError:
    VERSION = (0, 0)
else:
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
needs_triton = pytest.mark.skipif(VERSION == (0, 0), reason="Triton is not installed")
# Where kernels run in NumPy, those of all backends run on them alone (see calls.py).
TESTS = [
    ["test_contrastive.py", "test_contrastive_accuracy.py", "test_contrastive_operator.py"],
    ["contrastive_triton_interpreted.py"],
]


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (3, 5), reason="the kernels need Triton 3.5")
@pytest.mark.skipif(
    VERSION < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 needs numpy < 2.4",
)
@pytest.mark.parametrize("files", TESTS, ids=("all backends'", "its own"))
def test_numerics_under_the_interpreter(files):
    """In a process of their own: kernels are made for the interpreter when they are imported."""
    folder = Path(__file__).parent
    root = folder.parents[1]
    # NumPy warns of rows of NaN, of log(0) in a group of one pair, and of exponentials that
    # overflow before the guard replaces them.
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, *(str(folder / name) for name in files)],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
