"""The cost model against sums done by hand, and against published times of others' kernels."""

from __future__ import annotations

import pytest

from benchmarks.loss.gpu_model import cost_model
from benchmarks.loss.gpu_model.cost_model import TilePath, find_launch, kernel_phases
from benchmarks.loss.gpu_model.gpu_time import (
    A100,
    H100,
    Clocks,
    Gpu,
    Phase,
    clock,
    clocks_of,
    cost,
    gemm_seconds,
    occupancy,
    waves,
)
from benchmarks.loss.gpu_model.instructions import Instructions, Trace, trace
from benchmarks.loss.gpu_model.peer_kernels import published_rows, siglip_seconds
from benchmarks.result_files import read_csv
from fasterase.ops.contrastive.triton_plan import Tile

DRAIN = 91

# A loop over tiles around a loop over depth, then an if/else whose first arm is the longer one.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IADD3 R1, R1, R2, RZ ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/               @P0 BRA 0x90 ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/                   MUFU.EX2 R2, R2 ;
        /*0080*/                   BRA 0xa0 ;
        /*0090*/                   MUFU.EX2 R1, R1 ;
        /*00a0*/                   SHFL.BFLY PT, R1, R1, 0x1, 0x1f ;
        /*00b0*/                   STS.128 [R1], R4 ;
        /*00c0*/               @P2 BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""


# One loop over the depth of several tiles: a step skips the epilogue, and a tile its mask.
RUN_LISTING = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/               @P0 BRA 0x80 ;
        /*0030*/                   FMUL R24, R24, R1 ;
        /*0040*/               @P1 BRA P2, 0x60 ;
        /*0050*/                   FSEL R24, R24, -INF , P0 ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/                   FADD R2, R2, R1 ;
        /*0080*/               @P3 BRA 0x10 ;
        /*0090*/                   SHFL.BFLY PT, R1, R1, 0x1, 0x1f ;
        /*00a0*/               @P4 BRA 0x0 ;
        /*00b0*/                   EXIT ;
"""


def test_trace_of_tiles_that_share_a_loop() -> None:
    (step,), rest, run = trace(RUN_LISTING)
    assert step.issued == 3
    assert step.flops > 0
    assert rest == Instructions(issued=4, fp32=2, special=1)
    assert run == Instructions(issued=3, shuffle=1)


ROTATED_LISTING = """
        /*0000*/                   BRA 0x40 ;
        /*0010*/                   MUFU.EX2 R1, R1 ;
        /*0020*/                   FADD R2, R2, R1 ;
        /*0030*/                   STG.E [R2], R1 ;
        /*0040*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0070*/                   BRA 0x40 ;
        /*0080*/                   EXIT ;
"""


def test_trace_of_a_loop_whose_last_step_jumps_back_to_the_epilogue() -> None:
    (step,), rest, run = trace(ROTATED_LISTING)
    assert step == Instructions(issued=4, flops=2 * 16 * 8 * 16)
    assert rest == Instructions(issued=3, fp32=1, special=1)
    assert run is not None
    assert run.issued == 2


def test_tiles_that_share_a_loop_load_ahead() -> None:
    """Two of the twelve steps' loads move to the epilogue, and the run is shared by four tiles."""
    tile = Tile(256, 128, 64, 8, 3)
    launch = find_launch(H100, "sums", 768, None, tile)
    step, rest = Instructions(flops=2 * 256 * 128 * 64 / 8), Instructions(issued=100)
    path = TilePath(Trace((step,), rest, Instructions(issued=400)), 255, 0, 0)
    main, end, run = kernel_phases(H100, launch, path, 32768)
    load = (256 + 128) * 64 * 2 / (5120 / 132)
    assert main.clocks.tensor == 12 * 1024
    assert main.clocks.l2 == pytest.approx(10 * load)
    assert end.clocks.l2 == pytest.approx(2 * load + 8 * 256 / (5120 / 132))
    assert (main.latency, end.latency, run.latency) == (0, 0, 120)
    assert run.clocks.issue == 400 * 8 / 4 / 4
    apart = kernel_phases(H100, launch, path._replace(trace=Trace((step,), rest)), 32768)
    assert [phase.latency for phase in apart] == [480, 480]
    assert apart[0].clocks.l2 == pytest.approx(12 * load)


def test_trace_counts_a_step_and_the_shorter_arm() -> None:
    (step,), rest, run = trace(LISTING)
    assert run is None
    assert step.issued == 3
    assert step.flops * 4 == 2 * 64 * 128 * 16  # four warps execute one instruction together
    assert step.shared_bytes * 4 == (64 + 128) * 16 * 2
    # IADD3, BRA, one MUFU, SHFL, STS, BRA: not the long arm, nor what runs once before the loop.
    assert rest == Instructions(issued=6, alu=1, special=1, shuffle=1, shared_bytes=512)


def test_a_tile_of_products_by_hand() -> None:
    # 128 x 128 x 64 on an H100: 2 * 128 * 128 * 64 flops at 4096 a clock.
    step = Instructions(issued=80, flops=2 * 128 * 128 * 64 / 8)
    clocks = clocks_of(H100, step, 8, shared_bytes=32768, l2_bytes=32768)
    assert clocks.tensor == 512
    assert clocks.issue == 160
    assert clocks.shared == 256
    assert clocks.l2 == pytest.approx(32768 / (5120 / 132))
    assert clocks_of(A100, step, 8).tensor == 1024


def test_an_exponential_an_element_by_hand() -> None:
    # 64 elements a thread, 8 warps: 16384 exponentials, 16 a clock.
    clocks = clocks_of(H100, Instructions(issued=64, special=64, shuffle=10), 8)
    assert clocks.special == 1024
    assert clocks.shuffle == 80  # a warp's shuffle is 128 bytes
    assert clocks.shared == 80


def test_phases_add_up_alone_and_overlap_in_pairs() -> None:
    phases = (Phase(Clocks(tensor=1000, l2=400), 100), Phase(Clocks(issue=800)))
    alone = 1000 + 100 + 800 + 2 * DRAIN
    assert cost(phases, 1).tile == alone
    assert cost(phases, 1).binds.startswith("no overlap")
    assert cost(phases, 2) == (cost(phases, 2).clocks, 1041, alone, "no overlap (longest: tensor)")
    assert cost(phases, 3).tile == 1000
    assert cost(phases, 3).binds == "tensor"


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "blocks"),
    [
        (8, 254, 98304, 1),  # 8 * 32 * 256 registers are all there are
        (4, 254, 98304, 2),
        (4, 128, 98304, 2),  # now shared memory: 2 * 97 KB of 228
        (8, 64, 0, 4),
        (16, 255, 0, 0),
    ],
)
def test_occupancy(warps: int, registers: int, shared: int, blocks: int) -> None:
    assert occupancy(H100, warps, registers, shared) == blocks


def test_waves() -> None:
    assert waves(132, 132) == 1
    assert waves(133, 132) == pytest.approx(264 / 133)


def test_more_work_and_fewer_blocks_never_take_less() -> None:
    phases = (Phase(Clocks(tensor=1000, l2=400), 100), Phase(Clocks(issue=800)))
    tiles = [cost(phases, resident).tile for resident in (1, 2, 3, 4)]
    assert tiles == sorted(tiles, reverse=True)
    for field in Clocks._fields:
        more = Phase(phases[0].clocks._replace(**{field: 5000.0}))
        assert cost((more, *phases), 2).tile > cost(phases, 2).tile
    for gpu in (H100, A100):
        seconds = [gemm_seconds(gpu, 4096, 768, k, gpu.boost_hz) for k in (1024, 4096, 32768)]
        assert seconds == sorted(seconds)
        assert gemm_seconds(gpu, 8192, 768, 4096, 1e9) > gemm_seconds(gpu, 4096, 768, 4096, 1e9)


@pytest.mark.parametrize("gpu", [H100, A100])
def test_the_clock_reproduces_the_large_product(gpu: Gpu) -> None:
    seconds = gemm_seconds(gpu, 8192, 8192, 8192, clock(gpu))
    assert 2 * 8192**3 / seconds == pytest.approx(gpu.gemm_flops, rel=0.02)
    assert clock(gpu) <= gpu.boost_hz


def test_published_times_within_a_quarter() -> None:
    rows = list(published_rows())
    assert len(rows) == 3
    for row in rows:
        assert abs(row["error"]) < 0.25, row


def test_siglip_slows_down_with_small_chunks() -> None:
    # Published: 53.7 ms at 1024 rows a chunk, 48.2 at 4096.
    large, small = (siglip_seconds(H100, 65536, 768, rows)[0] for rows in (4096, 1024))
    assert 1.05 < small / large < 1.25


def test_main_writes_the_table_of_all_rows(tmp_path, monkeypatch, capsys) -> None:
    rows = list(published_rows())
    monkeypatch.setattr(cost_model, "rows", lambda n, wants_tiles: iter(rows))
    cost_model.main(["--output", str(tmp_path / "table.csv")])
    written = read_csv(tmp_path / "table.csv")
    assert [row["name"] for row in written] == [row["name"] for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert "memeff" in capsys.readouterr().out
