"""The Triton backend on a GPU, bf16 among the dtypes: numbers, devices, streams, modes, graphs.

All but the last test are skipped without a GPU.
"""

from __future__ import annotations

import pkgutil

import pytest
import torch
from torch.nn.functional import normalize

from fasterase.objective import Objective, weighted_erase_loss
from fasterase.ops.contrastive import contrastive, explain_backend, triton_plan
from tests.ops import triton_checks
from tests.ops.calls import INPUTS, arguments, assert_same_bits, check, leaves, make

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORKSPACE = "fasterase.ops.contrastive.triton_plan.WORKSPACE_BYTES"
LEAST_ROWS = "fasterase.ops.contrastive.triton_plan.LEAST_STRIP_ROWS"


def batch(dtype=torch.bfloat16, n=500, width=64, scale=14.3, *, ref_width=48, **options):
    """A call of `contrastive` on the GPU."""
    options = {"dtype": dtype, "ref_width": ref_width, "device": "cuda", **options}
    return make(n, width, scale, **options)[0]


def run(call, groups=None, **options):
    """All losses and gradients of a call, for equal weights."""
    losses = [x for x in contrastive(**call, groups=groups, **options) if x is not None]
    return [*losses, *torch.autograd.grad(sum(x.sum() for x in losses), leaves(call))]


def needs_free(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib:g} GiB of free memory on the GPU")


@needs_gpu
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
    options = {"dtype": dtype, "ref_width": ref_width, "labels": labels, "device": "cuda"}
    call, exact = make(n, width, scale, **options)
    check("triton", call, exact, groups)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_cones_fire_the_guard(dtype):
    triton_checks.check_guard(dtype, 400, (100, 300), device="cuda")


# One row block, several column blocks: every step reloads the row sums of the last. And 8700 rows,
# which are more than 32 blocks of 256: programs of several blocks.
@needs_gpu
@pytest.mark.parametrize(("width", "groups"), [(64, (100, 4300)), (128, (900, 8700))])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_runs_and_backwards_of_several_strips(dtype, reference, width, groups, monkeypatch):
    assert triton_plan.count_slots(8700, 256) < 8700 / 256
    monkeypatch.setattr(WORKSPACE, 2**23)
    monkeypatch.setattr(LEAST_ROWS, 1)
    options = {"device": "cuda", "reference": reference, "tolerance": 3e-4}
    triton_checks.check_torch_tiles(dtype, sum(groups), width, groups, **options)


@needs_gpu
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype, reference):
    call = batch(dtype, 9600, 128, 100.0, ref_width=64, reference=reference)
    first = run(call, (1000, 8600))
    for _ in range(3):
        assert_same_bits(run(call, (1000, 8600)), first)


@needs_gpu
def test_nothing_beyond_the_tensors_is_read():
    sizes = (300, 100, 60, (100, 200))
    triton_checks.check_nothing_beyond_is_read(torch.bfloat16, *sizes, device="cuda")


@needs_gpu
def test_auto_opcheck_compile_and_autocast():
    call = batch(n=200, ref_width=64)
    assert explain_backend(**call).name == "triton"
    plain = contrastive(**call)
    operator = torch.ops.fasterase.contrastive_triton.default
    torch.library.opcheck(operator, (*arguments(call, detached=False), [80, 120], "bf16"))
    compiled = torch.compile(lambda **kwargs: contrastive(**kwargs), fullgraph=True)(**call)
    assert_same_bits(plain, compiled)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = contrastive(**call)
        inside.ce_row.sum().backward()
    assert_same_bits(plain, inside)


@needs_gpu
@pytest.mark.parametrize("labels", [None, 300])
def test_cuda_graph(labels):
    call = batch(ref_width=64, labels=labels)

    def step():
        return run(call, (200, 300))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        call["image"].copy_(call["image"].flip(0))
        call["text"].copy_(call["text"].flip(0))
    graph.replay()
    assert_same_bits(found[:-1], step()[:-1])  # all but the gradient of scale


@needs_gpu
def test_memory_is_not_quadratic():
    """N = 16384: one fp32 matrix would be 1 GiB; the strips of G take the workspace's 256 MiB."""
    call = batch(n=16384, width=128, ref_width=128)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sum(x.sum() for x in contrastive(**call)).backward()
    assert torch.cuda.max_memory_allocated() - before < 450 * 2**20


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
    call = batch(n=65536, reference=False)
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
    gradients = torch.autograd.grad(sum(x.sum() for x in losses), leaves(call))
    assert_same_bits([*losses, *gradients], expected)
    assert {x.dtype for x in (*losses, *gradients)} == {torch.float32}


@needs_gpu
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_before_it_is_written(dtype, reference, monkeypatch):
    """Whatever is allocated holds NaN, and so does the workspace between strips."""
    monkeypatch.setattr(WORKSPACE, 2**17)
    monkeypatch.setattr(LEAST_ROWS, 1)
    call = batch(dtype, labels=90, reference=reference)
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
    call = make(8, 4, 14.3)[0]
    assert explain_backend(**call).products == "fp32"
