"""Print what `make test-scale` runs on, for the head of its log."""

from __future__ import annotations

import os
from importlib.metadata import version

from benchmarks.result_files import code_version, device_name

if __name__ == "__main__":
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "deepspeed", "bitsandbytes")
    )
    print(f"fasterase {code_version()}, {libraries}")
    print(f"{os.cpu_count()} cores of {device_name('cpu')}; gloo\n")
