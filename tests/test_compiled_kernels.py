"""Kernels compile ahead of time, without a GPU, to what the table of compiled kernels promises."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import compiled_kernels


@pytest.mark.parametrize("name", ["sweep", "strip"])
def test_no_spills_tensor_cores_and_shared_memory_within_the_limit(name):
    if not shutil.which(compiled_kernels.tool_path("cuobjdump")):
        pytest.skip("this triton has no cuobjdump")
    launches = compiled_kernels.launches(torch.bfloat16, 768, 768)
    (launch,) = [launch for launch in launches if launch.name == name]
    compiled = compiled_kernels.compile_launch(launch, 90)
    assert compiled.wgmma
    assert compiled.stack_bytes == 0
    assert compiled.loop["tensor"] > 0
    assert compiled.loop["local"] == 0
    assert compiled.shared_bytes <= compiled_kernels.SHARED_LIMIT[90]
