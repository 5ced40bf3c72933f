"""The Triton backend on a GPU, bf16 among the dtypes; skipped elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterase.ops.contrastive import contrastive, explain_backend, triton_plan
from tests.ops import triton_checks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "ref_width", "scale", "groups", "labels"),
    [
        (123, 80, 48, 14.3, None, None),
        (67, 33, 33, 100.0, (3, 64), 20),
        (130, 64, 96, 100.0, (130, 0), None),
        (300, 320, 200, 14.3, (1, 299), 90),
        (700, 1280, 512, 100.0, (200, 500), None),
    ],
)
def test_matches_the_oracle(dtype, n, width, ref_width, scale, groups, labels):
    triton_checks.check("cuda", dtype, n, width, ref_width, scale, groups, labels=labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_cones_fire_the_guard(dtype):
    triton_checks.check_guard("cuda", dtype, 400, (100, 300))


# One row block, several column blocks: every step reloads the row sums of the last. And 8700 rows,
# which are more than 32 blocks of 256: programs of several blocks.
@pytest.mark.parametrize(("width", "groups"), [(64, (100, 4300)), (128, (900, 8700))])
@pytest.mark.parametrize("has_ref", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_runs_and_backwards_of_several_strips(dtype, has_ref, width, groups, monkeypatch):
    assert triton_plan.count_slots(8700, 256) < 8700 / 256
    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", 2**23)
    monkeypatch.setattr(triton_plan, "LEAST_STRIP_ROWS", 1)
    triton_checks.check_torch_tiles(
        "cuda", dtype, sum(groups), width, groups, has_ref=has_ref, tolerance=3e-4
    )


@pytest.mark.parametrize("has_ref", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype, has_ref):
    call, _ = triton_checks.batch_on("cuda", dtype, 9600, 128, 64, 100.0)
    if not has_ref:
        call = triton_checks.without_reference(call)
    upstream = np.random.default_rng(0).normal(size=(4 if has_ref else 2, 9600))
    first = triton_checks.run(call, upstream, (1000, 8600))
    for _ in range(3):
        for left, right in zip(first, triton_checks.run(call, upstream, (1000, 8600)), strict=True):
            assert all(map(torch.equal, left, right))


def test_nothing_beyond_the_tensors_is_read():
    triton_checks.check_nothing_beyond_is_read("cuda", torch.bfloat16, 300, 100, 60, (100, 200))


def test_auto_opcheck_compile_and_autocast():
    call, _ = triton_checks.batch_on("cuda", torch.bfloat16, 200, 64, 64, 14.3)
    assert explain_backend(**call).name == "triton"
    names = ("image", "text", "scale", "ref_image", "ref_text", "ref_scale")
    plain = contrastive(**call)
    operator = torch.ops.fasterase.contrastive_triton.default
    torch.library.opcheck(operator, (*(call[k] for k in names), [80, 120], "bf16"))
    compiled = torch.compile(lambda **kwargs: contrastive(**kwargs), fullgraph=True)(**call)
    assert all(map(torch.equal, plain, compiled))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = contrastive(**call)
        inside.ce_row.sum().backward()
    assert all(map(torch.equal, plain, inside))


@pytest.mark.parametrize("labels", [None, 300])
def test_cuda_graph(labels):
    call, _ = triton_checks.batch_on("cuda", torch.bfloat16, 500, 64, 64, 14.3, labels=labels)
    upstream = np.ones((4, 500))
    weights = torch.ones(4, 500, device="cuda")

    def step():
        losses = torch.stack(list(contrastive(**call, groups=(200, 300))))
        return losses, torch.autograd.grad((losses * weights).sum(), [call["image"], call["text"]])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradients = step()
    with torch.no_grad():
        call["image"].copy_(call["image"].flip(0))
        call["text"].copy_(call["text"].flip(0))
    graph.replay()
    expected = triton_checks.run(call, upstream, (200, 300))
    assert all(map(torch.equal, losses, expected[0]))
    assert all(map(torch.equal, gradients, expected[1][:2]))


def test_memory_is_not_quadratic():
    """N = 16384: one fp32 matrix would be 1 GiB; the strips of G take the workspace's 256 MiB."""
    call, _ = triton_checks.batch_on("cuda", torch.bfloat16, 16384, 128, 128, 14.3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sum(x.sum() for x in contrastive(**call)).backward()
    assert torch.cuda.max_memory_allocated() - before < 450 * 2**20
