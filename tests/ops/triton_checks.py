"""Checks of the Triton backend that its tests run under the interpreter and on a GPU alike."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from fasterase.ops.contrastive import contrastive, triton_plan
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive.checks import resolve_products
from fasterase.ops.contrastive.operator import Batch
from tests import oracle
from tests.ops import calls
from tests.ops.calls import norm_error, relative_error, rounded, tensors, without_reference

# Under the interpreter: small tiles, so that every loop runs in seconds.
SMALL_TILE = triton_plan.Tile(32, 64, 32, 4, 1)

# The interpreter computes in NumPy, which warns of infinities that the kernels handle: log(0) in a
# group of one pair, exponentials that overflow before the guard replaces them.
INTERPRETED = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for key in triton_plan.TILES:
        monkeypatch.setitem(triton_plan.TILES, key, SMALL_TILE)
    triton_plan.plan_kernel.cache_clear()
    yield
    triton_plan.plan_kernel.cache_clear()


def batch_on(device, dtype, n, width, ref_width, scale, *, labels=None, gap=0.0, seed=0):
    """(call, batch): a call's arguments and, for the oracle, the same rounded to `dtype`."""
    batch = oracle.clip_like(
        n, width, scale, ref_width=ref_width, num_labels=labels, modality_gap=gap, seed=seed
    )
    batch.ref_scale = 100.0 if gap else 20.0
    batch = rounded(batch, dtype)
    return tensors(batch, dtype, scale_dtype=torch.float32, device=device), batch


run = functools.partial(calls.run, backend="triton")


def check(device, dtype, n, width, ref_width, scale, groups, *, labels=None, gap=0.0):
    """Values to 3e-4; gradients to 3e-4 in fp32, in half precision to a few roundings' norm."""
    call, batch = batch_on(device, dtype, n, width, ref_width, scale, labels=labels, gap=gap)
    # Logits near -95 carry 1e-5 of fp32 rounding, which the weight of a whole direction multiplies
    # by 100: weights of 1 / sqrt(N), between a mean's and a single sample's.
    weight, tolerance = (n**-0.5, 5e-4) if gap else (1.0, 3e-4)
    upstream = weight * np.random.default_rng(3).normal(size=(4, n))
    losses, gradients = run(call, upstream, groups)
    expected, exact = oracle.contrastive(batch, upstream, groups)
    for found, value in zip(losses, expected, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, value, scale) < tolerance
    for name, found in zip(("image", "text"), gradients, strict=False):
        assert found.dtype == dtype
        if dtype == torch.float32:
            assert relative_error(found, getattr(exact, name), scale) < tolerance
        else:
            epsilon = torch.finfo(dtype).eps
            assert norm_error(found, getattr(exact, name)) < (8 if gap else 2) * epsilon
    if dtype == torch.float32:
        assert relative_error(gradients[2], exact.scale, scale) < tolerance
    else:
        # A sum over cosines of either sign: its error counts against the terms, not the result.
        terms = np.abs(batch.image * exact.image).sum() / scale
        assert abs(gradients[2].item() - exact.scale) < torch.finfo(dtype).eps * terms


def check_torch_tiles(device, dtype, n, width, groups, *, has_ref, tolerance):
    """Against `"chunked"` in fp32."""
    call, _ = batch_on(device, dtype, n, width, 64, 14.3)
    if not has_ref:
        call = without_reference(call)
    upstream = np.random.default_rng(0).normal(size=(4 if has_ref else 2, n))
    losses, gradients = run(call, upstream, groups)
    wide = {k: v.detach().float() for k, v in call.items()}
    inputs = [wide[name].requires_grad_() for name in ("image", "text", "scale")]
    exact = contrastive(**wide, groups=groups, backend="chunked")[: len(upstream)]
    total = sum((torch.tensor(w).to(x) * x).sum() for w, x in zip(upstream, exact, strict=True))
    expected = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(losses, exact, rtol=tolerance, atol=tolerance / 10)
    for left, right in zip(gradients[:2], expected[:2], strict=True):
        error = norm_error(left, right.double().cpu().numpy())
        assert error < max(tolerance, 2 * torch.finfo(dtype).eps)


def check_guard(device, dtype, n, groups):
    """Opposite cones fire it in both groups."""
    call, _ = batch_on(device, dtype, n, 64, 64, 100.0, gap=5.0)
    assert flags(call, groups) == [1, 1]
    check(device, dtype, n, 64, 64, 100.0, groups, gap=5.0)


def check_nothing_beyond_is_read(device, dtype, n, width, ref_width, groups):
    call, _ = batch_on(device, dtype, n, width, ref_width, 100.0)
    upstream = np.ones((4, n))
    held = {k: poisoned(v) if v.dim() == 2 else v for k, v in call.items()}
    for name in ("image", "text"):
        held[name].requires_grad_()
    for left, right in zip(run(call, upstream, groups), run(held, upstream, groups), strict=True):
        assert all(map(torch.equal, left, right))


def poisoned(rows):
    """The same rows, in the middle of NaN."""
    buffer = torch.full((len(rows) + 70, rows.shape[1] + 70), torch.nan).to(rows)
    inside = buffer[: len(rows), : rows.shape[1]]
    inside.copy_(rows.detach())
    return inside


def flags(call, groups):
    """Return for each group whether the guard fired."""
    batch = Batch(
        *(call[k].detach() for k in ("image", "text", "scale")),
        *(call[k] for k in ("ref_image", "ref_text", "ref_scale")),
    )
    products = resolve_products("auto", "triton", (batch.image, batch.ref_image))
    return triton_backend.forward(batch, groups, products)[2].tolist()
