"""Kernels compile ahead of time, without a GPU, to what the table of compiled kernels promises."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import compiled_kernels
from benchmarks.listing import count_amd

# A loop over depth, inside a loop over tiles.
AMD_LISTING = """
strip:
.LBB0_1:
	v_exp_f32_e32 v0, v1
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
	global_load_dwordx4 v[2:5], v[0:1], off
	ds_read_b64 v[6:7], v0
	v_mfma_f32_32x32x8_bf16 v[0:15], v[6:7], v[8:9], v[0:15]
	s_cbranch_scc1 .LBB0_2
; %bb.3:
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	v_add_f32_dpp v0, v0, v0 row_shr:1
	scratch_store_dword off, v0, off
	s_cbranch_scc0 .LBB0_1
	s_endpgm
"""


@pytest.mark.skipif(
    tuple(map(int, compiled_kernels.triton.__version__.split(".")[:2])) < (3, 5),
    reason="the kernels need Triton 3.5",
)
@pytest.mark.parametrize(
    ("name", "target"),
    [("sweep", "sm_90"), ("strip", "sm_90"), ("strip_online", "sm_90"), ("strip", "gfx942")],
)
def test_no_spills_tensor_cores_and_shared_memory_within_the_limit(name, target):
    if not shutil.which(compiled_kernels.tool_path("cuobjdump")):
        pytest.skip("this triton has no cuobjdump")
    launches = compiled_kernels.launches(torch.bfloat16, 768, 768)
    (launch,) = [launch for launch in launches if launch.name == name]
    compiled = compiled_kernels.compile_launch(launch, target)
    assert compiled.wgmma == (target == "sm_90")
    assert compiled.stack_bytes == 0
    assert compiled.instructions.loop["tensor"] > 0
    assert compiled.instructions.loop["local"] == 0
    assert compiled.shared_bytes <= compiled_kernels.SHARED_LIMIT[target]


def test_amd_instructions_are_counted_in_the_inner_loop_and_in_all():
    loop, total = count_amd(AMD_LISTING)
    assert {unit: n for unit, n in loop.items() if n} == {
        "tensor": 1,
        "shared": 1,
        "global": 1,
        "other": 1,
    }
    assert {unit: total[unit] for unit in ("special", "shuffle", "local", "fp32", "other")} == {
        "special": 1,
        "shuffle": 1,
        "local": 1,
        "fp32": 1,
        "other": 3,
    }
