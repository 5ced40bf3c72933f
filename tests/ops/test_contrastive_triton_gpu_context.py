"""The Triton backend where a GPU's surroundings matter: devices, streams, sizes, modes, graphs.

All but the last test are skipped without a GPU.
"""

from __future__ import annotations

import pkgutil

import pytest
import torch
from torch.nn.functional import normalize

from fasterase.objective import Objective, weighted_erase_loss
from fasterase.ops.contrastive import contrastive, explain_backend
from tests.ops import triton_checks
from tests.ops.calls import INPUTS, assert_same_bits, without_reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WORKSPACE = "fasterase.ops.contrastive.triton_plan.WORKSPACE_BYTES"
LEAST_ROWS = "fasterase.ops.contrastive.triton_plan.LEAST_STRIP_ROWS"


def batch(dtype=torch.bfloat16, n=500, width=64, **options):
    """A call of `contrastive` on the GPU."""
    return triton_checks.batch_on("cuda", dtype, n, width, 48, 14.3, **options)[0]


def run(call, groups=None, **options):
    """All losses and gradients of a call, for equal weights."""
    losses = [x for x in contrastive(**call, groups=groups, **options) if x is not None]
    leaves = [call[name] for name in INPUTS]
    return [*losses, *torch.autograd.grad(sum(x.sum() for x in losses), leaves)]


def needs_free(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib:g} GiB of free memory on the GPU")


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    call = batch()
    expected = run(call)
    there = {k: v.detach().to("cuda:1") for k, v in call.items()}
    for name in INPUTS:
        there[name].requires_grad_()
    found = run(there)
    assert {x.device.index for x in found} == {1}
    assert torch.cuda.current_device() == 0
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.cpu(), right.cpu(), rtol=1e-3, atol=1e-4)


@needs_gpu
def test_kernels_follow_the_current_stream():
    """On a stream that writes the features late; kernels on another one would read the zeros."""
    call = batch()
    expected = run(call)
    late = {k: torch.zeros_like(v) for k, v in call.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for name, value in late.items():
            value.copy_(call[name].detach())
        for name in INPUTS:
            late[name].requires_grad_()
        found = run(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, expected)


@needs_gpu
def test_more_than_two_to_the_31_numbers_in_the_features():
    """In groups of 4,096 pairs, so that it takes no minute; the last is held against itself."""
    needs_free(60)
    groups, width = (4096,) * 512, 1088
    n = sum(groups)
    assert n * width > 2**31
    last = slice(n - groups[-1], n)
    generator = torch.Generator("cuda").manual_seed(0)
    call = {"scale": torch.tensor(14.3, device="cuda")}
    for name in ("image", "text"):
        rows = torch.empty(n, width, device="cuda", dtype=torch.bfloat16)
        for start in range(0, n, 2**16):
            part = torch.randn(2**16, width, device="cuda", generator=generator)
            rows[start : start + 2**16] = normalize(part)
        call[name] = rows.requires_grad_()
    losses = contrastive(**call, groups=groups)
    gradients = torch.autograd.grad(losses.ce_row.sum() + losses.ce_col.sum(), call["image"])
    alone = {k: v.detach() if v.dim() == 0 else v.detach()[last].clone() for k, v in call.items()}
    alone["image"].requires_grad_()
    expected = contrastive(**alone)
    torch.testing.assert_close(losses.ce_row[last], expected.ce_row, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.ce_col[last], expected.ce_col, rtol=1e-4, atol=1e-4)
    total = expected.ce_row.sum() + expected.ce_col.sum()
    (of_alone,) = torch.autograd.grad(total, alone["image"])
    torch.testing.assert_close(gradients[0][last], of_alone, rtol=2e-2, atol=1e-3)


@needs_gpu
def test_strips_of_more_than_two_to_the_31_numbers(monkeypatch):
    needs_free(16)
    call = batch(n=65536)
    call = without_reference(call)
    expected = run(call)
    monkeypatch.setattr(WORKSPACE, 6 * 2**30)  # 49,152 rows of G in bf16
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(call)
    assert torch.cuda.max_memory_allocated() - before > 2**32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


@needs_gpu
def test_any_number_of_pairs_under_one_compilation():
    calls = [batch(n=n) for n in (200, 333, 64)]
    compiled = torch.compile(lambda **kwargs: contrastive(**kwargs), fullgraph=True, dynamic=True)
    for number, call in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = compiled(**call)
        assert_same_bits(found, contrastive(**call))


@needs_gpu
def test_tf32_is_used_only_if_torch_allows_it():
    call = batch(torch.float32)
    exact = run(call)
    before = torch.get_float32_matmul_precision()
    assert explain_backend(**call).products == "fp32"
    try:
        torch.set_float32_matmul_precision("high")
        assert explain_backend(**call).products == "tf32"
        rounded = run(call)
        still_exact = run(call, products="fp32")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits(still_exact, exact)
    assert not torch.equal(rounded[0], exact[0])
    torch.testing.assert_close(rounded[:2], exact[:2], rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("name", HALVES)
def test_autocast_rounds_the_products_of_fp32_features(name):
    call = batch(torch.float32)
    expected = run(call, products=name)
    with torch.autocast("cuda", dtype=HALVES[name]):
        assert explain_backend(**call).products == name
        losses = [x for x in contrastive(**call) if x is not None]
    # As in AMP: the backward pass runs outside of autocast.
    leaves = [call[name] for name in INPUTS]
    gradients = torch.autograd.grad(sum(x.sum() for x in losses), leaves)
    assert_same_bits([*losses, *gradients], expected)
    assert {x.dtype for x in (*losses, *gradients)} == {torch.float32}


@needs_gpu
@pytest.mark.parametrize("has_ref", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_read_before_it_is_written(dtype, has_ref, monkeypatch):
    """Whatever is allocated holds NaN, and so does the workspace between strips."""
    monkeypatch.setattr(WORKSPACE, 2**17)
    monkeypatch.setattr(LEAST_ROWS, 1)
    call = batch(dtype, labels=90)
    if not has_ref:
        call = without_reference(call)
    expected = run(call, (200, 300))

    def filled(allocate):
        def allocate_nan(*args, **kwargs):
            found = allocate(*args, **kwargs)
            return found.fill_(torch.nan) if found.is_floating_point() else found.fill_(2**30)

        return allocate_nan

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    assert_same_bits(run(call, (200, 300)), expected)


@needs_gpu
def test_a_cuda_graph_of_a_whole_step():
    """Towers, normalisation, the objective, its gradients and the update, captured once."""
    generator = torch.Generator("cuda").manual_seed(0)
    towers = torch.nn.ModuleList([torch.nn.Linear(48, 64), torch.nn.Linear(32, 64)]).cuda()
    inputs = [torch.randn(320, k, device="cuda", generator=generator) for k in (48, 32)]
    fresh = [torch.randn(320, k, device="cuda", generator=generator) for k in (48, 32)]
    reference = [
        normalize(torch.randn(320, 64, device="cuda", generator=generator)) for _ in range(2)
    ]
    optimizer = torch.optim.Adam(towers.parameters(), lr=1e-2, capturable=True)
    scale, ref_scale = (torch.tensor(x, device="cuda") for x in (50.0, 100.0))

    def step():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.float16):
            image, text = (tower(x).float() for tower, x in zip(towers, inputs, strict=True))
        loss = weighted_erase_loss(
            normalize(image),
            normalize(text),
            scale,
            *reference,
            ref_scale,
            Objective(anchor_weight=30.0),
            n_forget=64,
        )
        loss.total.backward()
        optimizer.step()
        return loss.total.detach()

    def snapshot():
        return [p.detach().clone() for p in towers.parameters()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    start = snapshot()
    state = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    for held, new in zip(inputs, fresh, strict=True):
        held.copy_(new)
    expected_loss = step().clone()
    expected = snapshot()

    with torch.no_grad():
        for parameter, value in zip(towers.parameters(), start, strict=True):
            parameter.copy_(value)
        for held, values in zip(optimizer.state.values(), state, strict=True):
            for name, value in values.items():
                held[name].copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    assert all(map(torch.equal, snapshot(), start))  # capturing runs nothing
    graph.replay()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(snapshot(), expected, rtol=1e-3, atol=1e-4)


def test_what_the_tests_on_a_gpu_replace_exists():
    """Here, since without a GPU nothing else would notice a new name."""
    pytest.importorskip("triton")
    assert isinstance(pkgutil.resolve_name(WORKSPACE), int)
    assert isinstance(pkgutil.resolve_name(LEAST_ROWS), int)
    call = triton_checks.batch_on("cpu", torch.float32, 8, 4, 4, 14.3)[0]
    assert explain_backend(**call).products == "fp32"
