"""The backends as torch operators: schemas, fake tensors, autograd, one graph under compile."""

from __future__ import annotations

import pytest
import torch

from fasterase.ops.contrastive import available_backends
from tests.ops.calls import features, weighted_mean

# On CPU tensors; test_contrastive_triton*.py have the GPU's backend.
BACKENDS = tuple(name for name in available_backends() if name not in ("dense", "triton"))
# Further arguments of each operator. cpu: labels, in tiles of 8, some of the 2 x 15 x 15 + 2 x 25 x
# 25 logits kept; no labels, tiles of 512, none kept, products in bf16.
OPTIONS = {
    "chunked": [("fp32",), ("bf16",)],
    "cpu": [(torch.arange(40) // 2, 8, 700, False), (None, 512, 0, True)],
}


def operators(backend):
    name = f"contrastive_{backend}"
    namespace = torch.ops.fasterase
    return getattr(namespace, name).default, getattr(namespace, f"{name}_backward").default


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype):
    forward, backward = operators(backend)
    batch = features(dtype=dtype)
    some, others = OPTIONS[backend]
    torch.library.opcheck(forward, (*batch, [15, 25], *some))
    torch.library.opcheck(forward, (*batch[:3], None, None, None, [40], *others))
    arguments = [x.detach() for x in batch]
    losses, *found = forward(*arguments, [15, 25], *some)
    upstream = torch.randn_like(losses)
    for wanted in ((True, False, True, True), (False, True, False, False)):
        torch.library.opcheck(backward, (upstream, *arguments, *found, [15, 25], *wanted, *some))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ kernels")
@pytest.mark.parametrize("kept", [0, 700, 100_000])
@pytest.mark.parametrize("labels", [None, torch.arange(40) % 30])
@pytest.mark.parametrize("groups", [(15, 25), (1, 39), (40,)])
def test_a_step_that_knows_its_weights_computes_only_the_kls_that_have_one(groups, kept, labels):
    forward, backward = operators("cpu")
    step = torch.ops.fasterase.contrastive_cpu_step.default
    batch = [x.detach() for x in features()]
    weights = torch.randn(4, 40)
    options = labels, 8, kept, False
    for unused in (0, groups[0]):
        weights[2:, :unused] = 0
        losses, *found = forward(*batch, groups, *options)
        losses[2:, :unused] = 0
        gradients = backward(weights, *batch, *found, groups, *[True] * 4, *options)
        call = (weights, *batch, groups, *[True] * 4, *options)
        assert all(map(torch.equal, step(*call), (losses, *gradients)))
        torch.library.opcheck(step, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_turned_features(backend):
    forward, backward = operators(backend)
    turned = [x.detach().t().contiguous().t() if x.dim() == 2 else x.detach() for x in features()]
    options = OPTIONS[backend][1]
    losses, *found = forward(*turned, [40], *options)
    call = (torch.ones_like(losses), *turned, *found, [40], True, True, True, True, *options)
    torch.library.opcheck(backward, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_come_rounded_or_in_the_dtype_of_the_computation(backend):
    forward, backward = operators(backend)
    batch = [x.detach() for x in features(feature_dtype=torch.float16)]
    options = OPTIONS[backend][0]
    losses, *found = forward(*batch, [40], *options)
    upstream = torch.ones_like(losses)
    call = (upstream, *batch, *found, [40])
    exact = backward(*call, True, True, True, False, *options)
    rounded = backward(*call, True, True, True, True, *options)
    assert [x.dtype for x in exact] == [torch.float32] * 3
    assert [x.dtype for x in rounded] == [torch.float16, torch.float16, torch.float32]
    assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(exact, rounded, strict=True))
    assert not torch.equal(exact[0], rounded[0].float())
    only_text = backward(*call, False, True, False, False, *options)
    assert only_text[0].shape == (0,)
    assert torch.equal(only_text[1], exact[1])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_as_one_graph(backend):
    compiled = torch.compile(weighted_mean, fullgraph=True, backend="aot_eager")
    for n in (40, 52, 57):  # from the second on with symbolic sizes
        batch = features(n)
        found, expected = (f(*batch, backend) for f in (compiled, weighted_mean))
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(x, batch[:3]) for x in (found, expected)]
        assert all(map(torch.equal, *gradients))
