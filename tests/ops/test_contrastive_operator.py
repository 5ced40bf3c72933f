"""The backends as torch operators: schemas, fake tensors, autograd, one graph under compile."""

from __future__ import annotations

import pytest
import torch

from fasterase.ops.contrastive import contrastive, weighted_contrastive
from tests.ops.calls import (
    BACKENDS,
    IS_INTERPRETED,
    TILED,
    WIDE,
    arguments,
    assert_same_bits,
    each_tiled_backend,
    leaves,
    make,
)

# Further arguments of each operator. cpu: labels, in tiles of 8, some of the 2 x 15 x 15 + 2 x 25 x
# 25 logits kept; no labels, tiles of 512, none kept, products in bf16.
OPTIONS = {
    "chunked": [("fp32",), ("bf16",)],
    "cpu": [(torch.arange(40) // 2, 8, 700, False), (None, 512, 0, True)],
    "triton": [("fp32",), ("fp16",)],
}


def operators(backend):
    """Forward and backward, and the step of backends that have one."""
    name = f"contrastive_{backend}{'_interpreted' if IS_INTERPRETED else ''}"
    names = (name, f"{name}_backward", *([] if backend == "chunked" else [f"{name}_step"]))
    return [getattr(torch.ops.fasterase, each).default for each in names]


@pytest.mark.parametrize("dtype", sorted({torch.float32, WIDE}, key=str))
@each_tiled_backend
def test_opcheck(backend, dtype):
    forward, backward, *steps = operators(backend)
    call, _ = make(dtype=dtype)
    some, others = OPTIONS[backend]
    batch = arguments(call, detached=False)
    torch.library.opcheck(forward, (*batch, [15, 25], *some))
    torch.library.opcheck(forward, (*batch[:3], None, None, None, [40], *others))
    batch = arguments(call)
    losses, *saved = forward(*batch, [15, 25], *some)
    upstream = torch.randn_like(losses)
    for wanted in ((True, False, True, True), (False, True, False, False)):
        torch.library.opcheck(backward, (upstream, *batch, *saved, [15, 25], *wanted, *some))
        for step in steps:
            torch.library.opcheck(step, (upstream, *batch, [15, 25], *wanted, *some))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ kernels")
@pytest.mark.parametrize("kept", [0, 700, 100_000])
@pytest.mark.parametrize("labels", [None, torch.arange(40) % 30])
@pytest.mark.parametrize("groups", [(15, 25), (1, 39), (40,)])
def test_a_step_that_knows_its_weights_computes_only_the_kls_that_have_one(groups, kept, labels):
    forward, backward, step = operators("cpu")
    batch = arguments(make()[0])
    weights = torch.randn(4, 40)
    options = labels, 8, kept, False
    for unused in (0, groups[0]):
        weights[2:, :unused] = 0
        losses, *saved = forward(*batch, groups, *options)
        losses[2:, :unused] = 0
        gradients = backward(weights, *batch, *saved, groups, *[True] * 4, *options)
        found = step(weights, *batch, groups, *[True] * 4, *options)
        assert_same_bits(found, (losses, *gradients))


@each_tiled_backend
def test_opcheck_of_turned_features(backend):
    forward, backward, *_ = operators(backend)
    turned = [x.t().contiguous().t() if x.dim() == 2 else x for x in arguments(make()[0])]
    options = OPTIONS[backend][1]
    losses, *saved = forward(*turned, [40], *options)
    call = (torch.ones_like(losses), *turned, *saved, [40], True, True, True, True, *options)
    torch.library.opcheck(backward, call)


@each_tiled_backend
def test_gradients_come_rounded_or_in_the_dtype_of_the_computation(backend):
    forward, backward, *_ = operators(backend)
    batch = arguments(make(dtype=torch.float16)[0])
    options = OPTIONS[backend][0]
    losses, *saved = forward(*batch, [40], *options)
    call = (torch.ones_like(losses), *batch, *saved, [40])
    exact = backward(*call, True, True, True, False, *options)
    rounded = backward(*call, True, True, True, True, *options)
    assert [x.dtype for x in exact] == [torch.float32] * 3
    assert [x.dtype for x in rounded] == [torch.float16, torch.float16, torch.float32]
    assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(exact, rounded, strict=True))
    assert not torch.equal(exact[0], rounded[0].float())
    only_text = backward(*call, False, True, False, False, *options)
    assert only_text[0].shape == (0,)
    assert torch.equal(only_text[1], exact[1])


def weighted_mean(call, backend):
    losses = contrastive(**call, backend=backend)
    return sum(weight * x.mean() for weight, x in enumerate(losses, 1)), losses


def weighted_total(call, backend):
    weights = torch.linspace(-1, 1, 4 * len(call["image"])).view(4, -1)
    total, losses = weighted_contrastive(**call, weights=weights, backend=backend)
    return 65536.0 * total, losses


@pytest.mark.parametrize("function", [weighted_mean, weighted_total])
@pytest.mark.parametrize("backend", TILED if IS_INTERPRETED else ("auto", "chunked"))
def test_compiles_as_one_graph(backend, function):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (40, 52, 57):  # from the second on with symbolic sizes
        call, _ = make(n)
        runs = [run(call, backend) for run in (compiled, function)]
        assert_same_bits(*([total, *losses] for total, losses in runs))
        assert_same_bits(*(torch.autograd.grad(total, leaves(call)) for total, _ in runs))
        assert runs[0][1].kl_col.requires_grad is (function is weighted_mean)
