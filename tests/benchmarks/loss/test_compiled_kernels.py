"""Kernels compile ahead of time, without a GPU, to what the table of compiled kernels promises."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.loss.gpu_model import compiled_kernels, host_time
from benchmarks.loss.gpu_model.instructions import count_amd
from benchmarks.result_files import RESULTS, read_csv
from fasterase.engine.loss import loss_products
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive.operator import Wanted
from fasterase.ops.contrastive.triton_plan import TILES, choose_tile

NEEDS_TRITON = pytest.mark.skipif(
    tuple(map(int, compiled_kernels.triton.__version__.split(".")[:2])) < (3, 5),
    reason="the kernels need Triton 3.5",
)
NEEDS_TOOLS = pytest.mark.skipif(
    not shutil.which(compiled_kernels.tool_path("cuobjdump")), reason="this triton has no cuobjdump"
)

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


@pytest.mark.slow
@NEEDS_TRITON
@NEEDS_TOOLS
@pytest.mark.parametrize(
    ("name", "ref_width", "target"),
    [
        ("row_and_column_sums", None, "sm_80"),
        ("row_and_column_sums", None, "sm_90"),
        ("row_and_column_sums", None, "gfx942"),
        ("row_and_column_sums_with_reference", 768, "sm_90"),
        ("gradient_strip_without_reference", None, "sm_90"),
        ("gradient_strip", 768, "sm_90"),
        ("gradient_strip_online", 768, "sm_90"),
        ("gradient_strip_with_crosses", 768, "sm_90"),
        ("gradient_strip_with_crosses", 768, "sm_100"),
        ("gradient_strip_with_crosses", 768, "sm_120"),
        ("gradient_strip", 768, "gfx942"),
    ],
)
def test_no_spills_tensor_cores_and_shared_memory_within_the_limit(name, ref_width, target):
    launches = compiled_kernels.launches(torch.bfloat16, 768, ref_width, target)
    (launch,) = [launch for launch in launches if launch.name == name]
    compiled = compiled_kernels.compile_launch(launch, target)
    assert compiled["wgmma"] == (target == "sm_90")
    assert compiled["stack_bytes"] == compiled["loop_local"] == 0
    assert compiled["loop_tensor"] > 0
    assert compiled["shared_bytes"] <= compiled_kernels.SHARED_LIMIT[target]


@pytest.mark.slow
@NEEDS_TRITON
@NEEDS_TOOLS
@pytest.mark.parametrize(
    ("ref_width", "products"),
    [
        pytest.param(512, loss_products("bf16"), id="unlearn"),
        pytest.param(None, "bf16", id="ClipLoss under autocast"),
    ],
)
def test_fp32_features_reach_the_tensor_cores(ref_width, products):
    """As `unlearn` and `ClipLoss` under autocast give them; the table has the same cases."""
    launches = compiled_kernels.launches(torch.float32, 512, ref_width, "sm_90", products)
    multiplying = [launch for launch in launches if "PRECISION" in launch.arguments]
    assert len(multiplying) == (6 if ref_width else 4)
    for launch in multiplying:
        compiled = compiled_kernels.compile_launch(launch, "sm_90")
        assert compiled["wgmma"]
        assert compiled["stack_bytes"] == 0
    assert any(launch.arguments.get("ROUNDS") for launch in launches)
    cases = {launch.case.split(" D=")[0] for launch in compiled_kernels.cases("sm_90")}
    assert f"float32 as {products}" in cases


def test_no_kernel_of_the_committed_table_spills_or_exceeds_its_gpu():
    """All that `auto` can launch, by the table; the slow tests above compile some of it again."""
    rows = read_csv(RESULTS / "compiled_kernels.csv")
    assert {row["target"] for row in rows} == set(compiled_kernels.SHARED_LIMIT)
    for row in rows:
        assert int(row["shared_bytes"]) <= compiled_kernels.SHARED_LIMIT[row["target"]], row
        assert int(row["stack_bytes"]) <= 64 or row["target"] == "gfx942", row


@NEEDS_TRITON
def test_few_kernels_serve_all_sizes_and_a_handle_serves_its_kind():
    """Handles are found by kernel and constants alone, within calls of one signature."""
    rng = random.Random(0)
    specialisations, by_handle = {}, {}

    def step(sizes, width, dtype, *, has_ref, offset=0, wanted=(True, True, True, False)):
        n = sum(sizes)
        memory = torch.empty(n * width + offset, dtype=dtype)
        batch = host_time.make_batch(n, width, has_ref, dtype)
        batch = batch._replace(image=memory[offset:].view(n, width))
        weights = torch.empty(2 * batch.matrices, n)
        with compiled_kernels.recorded() as found:
            triton_backend.step(weights, batch, sizes, Wanted(*wanted), "bf16")
        for launch in found:
            options = launch.kernel.__name__, *launch.options.values()
            found = repr((options, compiled_kernels.specialise(launch)))
            assert by_handle.setdefault(launch.handle, found) == found
            specialisations.setdefault((width, dtype, offset), set()).add(found)

    with host_time.fake_driver():
        for _ in range(60):
            sizes = rng.randint(1, 300), rng.randint(1, 2500)
            for has_ref in (False, True):
                step(sizes, 64, torch.bfloat16, has_ref=has_ref)
        assert len(specialisations.popitem()[1]) <= 14
        for k in range(40):
            wanted = [rng.random() < 0.7 for _ in range(4)]
            step(
                (1, 16, 33, 17)[k % 3 :],
                rng.choice((1, 16, 60, 64)),
                rng.choice((torch.float32, torch.bfloat16)),
                has_ref=rng.random() < 0.5,
                offset=rng.choice((0, 1, 4)),
                wanted=wanted,
            )


@NEEDS_TOOLS
@pytest.mark.parametrize("name", ["row_and_column_sums", "gradient_strip_without_reference"])
def test_products_of_one_tile_run_beside_the_loads_of_the_next(name):
    """On Hopper: a step leaves its product in flight and loads on; the epilogue waits for it.

    Each step waits for loads, and all threads for one another: that orders the row sums that one
    column of tiles stores and the next one reads.
    """
    launches = compiled_kernels.launches(torch.bfloat16, 768, None, "sm_90")
    (launch,) = [launch for launch in launches if launch.name == name]
    loop = compiled_kernels.build(launch, "sm_90").asm["ttgir"].split("scf.for")[-1]
    product, epilogue = loop.index("warp_group_dot "), loop.index("scf.if")
    assert "async_wait" in loop[:product]
    assert "pendings = 1" in loop[product:epilogue]
    assert "async_copy_global_to_local" in loop[product:epilogue]
    assert "pendings = 0" in loop[epilogue:]


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("widths", [(768, 768), (500, 768), (768, 500)])
def test_tiles_of_an_architecture(is_half, widths):
    tiles = {
        (kernel, architecture): choose_tile(kernel, is_half, widths, architecture)
        for kernel, half in TILES
        if half == is_half
        for architecture in ("sm_80", "sm_90", "sm_120", "gfx", "interpreter")
    }
    for kernel, architecture in tiles:
        if architecture in ("sm_80", "sm_120") or not is_half or widths != (768, 768):
            assert tiles[kernel, architecture] == tiles[kernel, "interpreter"]
    if is_half and widths == (768, 768):
        assert tiles["sums", "sm_90"] != tiles["sums", "sm_80"]


def test_amd_instructions_are_counted_in_the_inner_loop_and_in_all():
    counts = count_amd(AMD_LISTING)
    in_loop = {name: n for name, n in counts.items() if name.startswith("loop_") and n}
    assert in_loop == {f"loop_{unit}": 1 for unit in ("tensor", "shared", "global", "other")}
    for unit in ("special", "shuffle", "local", "fp32"):
        assert counts[f"total_{unit}"] == 1
    assert counts["total_other"] == 3
