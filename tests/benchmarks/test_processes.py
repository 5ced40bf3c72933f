"""Processes that measure end with the command that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.launched import assert_end, family

ROOT = Path(__file__).parents[2]
WITH_ROOT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = """
import time
from benchmarks.processes import call_all

if __name__ == "__main__":
    call_all(time.sleep, [600, 601], processes=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of their parent's death")
def test_nothing_outlives_a_killed_command(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    job = subprocess.Popen([sys.executable, script], cwd=ROOT, env=WITH_ROOT, text=True)
    until = time.monotonic() + 60
    while len(everyone := family(job)) < 4 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(5.0)  # until the workers have imported torch, and wait in their call
    job.kill()
    job.wait()
    assert len(everyone) >= 4
    assert_end(everyone, 10.0)
