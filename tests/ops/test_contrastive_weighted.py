"""`weighted_contrastive` against `contrastive`: values, gradients, memory between the passes."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.errors import InputError
from fasterase.ops.contrastive import api, contrastive, weighted_contrastive
from tests.ops.calls import INPUTS, assert_same_bits, each_backend, each_tiled_backend, leaves, make

N, WIDTH = 60, 8


def batch(dtype=torch.float32, *, n=N, reference=True, wanted=INPUTS, **options):
    """(call, weights)."""
    call, _ = make(n, WIDTH, ref_width=5, dtype=dtype, reference=reference, **options)
    for name in INPUTS:
        call[name].requires_grad_(name in wanted)
    weights = np.random.default_rng(1).normal(size=(4 if reference else 2, n))
    return call, torch.tensor(weights, dtype=torch.float64)


def plain(weights, **call):
    """What autograd makes of the losses."""
    losses = [loss for loss in contrastive(**call) if loss is not None]
    return (weights.to(losses[0].dtype) * torch.stack(losses)).sum(), losses


def gradients(total, call):
    return torch.autograd.grad(total, leaves(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, None),
        ({"reference": False}, (20, 0, 40)),
        ({"labels": 25}, (10, 50)),
        ({"labels": 25, "reference": False, "wanted": ("text",)}, None),
        *(({"wanted": w}, None) for k in (1, 2) for w in itertools.combinations(INPUTS, k)),
    ],
)
@each_backend
def test_matches_the_losses_and_their_gradients(backend, options, groups, dtype):
    call, weights = batch(dtype, **options)
    call |= {"groups": groups, "backend": backend}
    found = weighted_contrastive(weights=weights, **call)
    expected, losses = plain(weights, **call)
    assert found.total.shape == ()
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-4)
    assert (found.losses.kl_row is None) == ("reference" in options)
    for loss, value in zip(found.losses, losses, strict=False):
        assert torch.equal(loss, value)
        assert not loss.requires_grad
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for one, other in zip(gradients(found.total, call), gradients(expected, call), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max().item())


@each_tiled_backend
def test_a_grad_scaler_s_factor_arrives_before_the_rounding(backend):
    """A power of two: the same bits. Without it the gradients are below fp16's normal range."""
    call, weights = batch(torch.float16, scale=100.0)
    weights = weights / 2**24
    call["backend"] = backend
    found = gradients(65536.0 * weighted_contrastive(weights=weights, **call).total, call)
    expected = gradients(65536.0 * plain(weights, **call)[0], call)
    assert_same_bits(found, expected)
    unscaled = gradients(weighted_contrastive(weights=weights, **call).total, call)
    late = 65536.0 * unscaled[0].float()
    assert (late - found[0].float()).norm() > 2e-3 * found[0].float().norm()


@each_tiled_backend
def test_large_weights_of_half_precision_do_not_overflow_between_the_passes(backend):
    call, weights = batch(torch.float16)
    found = weighted_contrastive(weights=65536.0 * weights, **call, backend=backend).total
    expected, _ = plain(weights, **call, backend=backend)
    assert_same_bits(gradients(found / 65536.0, call), gradients(expected, call))


@each_tiled_backend
def test_derivatives_in_forward_mode_are_refused(backend):
    """They would be 0, silently."""
    image, weights = torch.eye(3), torch.ones(2, 3)

    def total(rows):
        return weighted_contrastive(rows, torch.eye(3), 2.0, weights, backend=backend).total

    with pytest.raises(RuntimeError):
        torch.func.jvp(total, (image,), (image,))


@each_tiled_backend
def test_a_grad_scaler_s_factor_reaches_gradients_of_repeated_labels_too(backend):
    call, weights = batch(torch.float16, labels=12)
    weights = weights.float() * 1e-7
    total = weighted_contrastive(weights=weights, backend=backend, **call).total
    found = torch.autograd.grad(total * 2.0**16, call["image"])[0]
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in call.items()}
    exact["image"].requires_grad_()
    total = plain(weights.double() * 2.0**16, **exact, backend="dense")[0]
    expected = torch.autograd.grad(total, exact["image"])[0]
    assert (found - expected).norm() < 2e-3 * expected.norm()


@each_tiled_backend
def test_only_gradients_live_between_the_passes(backend):
    call, weights = batch(wanted=("image", "scale"))
    watched = [weakref.ref(call[name]) for name in ("ref_image", "ref_text", "text")]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        total, _ = weighted_contrastive(weights=weights, **call, backend=backend)
    del call["ref_image"], call["ref_text"], call["text"]
    assert [ref() for ref in watched] == [None] * 3
    assert sum(x.numel() for x in packed) <= N * WIDTH + 1
    total.backward()
    assert call["image"].grad is not None


class Operators(TorchDispatchMode):
    """Lists our operators as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasterase":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@each_tiled_backend
def test_gradients_are_made_in_the_forward_pass_where_any_is_wanted(backend):
    forward = f"contrastive_{backend}"
    call, weights = batch()
    with Operators() as called:
        total = weighted_contrastive(weights=weights, **call, backend=backend).total
    has_step = api.load_backend(backend).step is not None
    assert called.names == ([f"{forward}_step"] if has_step else [forward, f"{forward}_backward"])
    with Operators() as called:
        total.backward()
    assert called.names == []
    with Operators() as called, torch.no_grad():
        weighted_contrastive(weights=weights, **call, backend=backend)
    assert called.names == [forward]
    call, weights = batch(wanted=())
    with Operators() as called:
        found = weighted_contrastive(weights=weights, **call, backend=backend)
    assert called.names == [forward]
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, total.detach(), rtol=0, atol=0)


@each_tiled_backend
def test_differentiable_once_and_over_a_retained_graph(backend):
    call, weights = batch()
    total = weighted_contrastive(weights=weights, **call, backend=backend).total
    first = torch.autograd.grad(total, call["image"], retain_graph=True)[0]
    second = torch.autograd.grad(total * call["image"].sum(), call["image"], create_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, call["image"], retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()
    kept = first.clone()
    first.zero_()  # the caller's own
    assert torch.equal(kept, torch.autograd.grad(total, call["image"])[0])


@each_tiled_backend
def test_autocast_changes_nothing(backend):
    call, weights = batch(labels=25)
    expected = weighted_contrastive(weights=weights, **call, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_contrastive(weights=weights, **call, backend=backend)
    assert_same_bits(*((each.total, *gradients(each.total, call)) for each in (found, expected)))


@each_backend
def test_a_batch_without_pairs(backend):
    empty = torch.zeros(0, 3, requires_grad=True)
    found = weighted_contrastive(empty, empty, 1.0, torch.zeros(2, 0), backend=backend)
    assert found.total == 0
    assert found.losses.ce_row.shape == (0,)
    assert found.losses.kl_row is None
    found.total.backward()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights must be a tensor of shape \(4, 60\), of ce_row, .*kl_col.*; got list"),
        (torch.ones(4), r"weights must be .*shape \(4, 60\).*got .*\(4,\)"),
        (torch.ones(2, N), r"weights must be .*shape \(4, 60\).*got .*\(2, 60\)"),
        (torch.ones(4, N).long(), "weights must be float.*int64"),
        (torch.ones(4, N, device="meta"), "weights must be .* on image's device cpu; got .* meta"),
        (torch.ones(4, N, requires_grad=True), "weights require grad.*detach"),
    ],
)
def test_wrong_weights_are_named(weights, message):
    call, _ = batch()
    with pytest.raises(InputError, match=message):
        weighted_contrastive(weights=weights, **call)


def test_gradients_of_several_upstreams_at_once():
    """As `torch.func` and `jacobian(vectorize=True)` ask for them."""
    call, weights = batch(reference=False)
    image, upstreams = call["image"], torch.tensor([1.0, 2.0, 0.5])

    def total():
        return weighted_contrastive(**call, weights=weights).total

    (found,) = torch.autograd.grad(total(), image, upstreams, is_grads_batched=True)
    (once,) = torch.autograd.grad(total(), image)
    assert torch.equal(found, upstreams[:, None, None] * once)
