"""The backends of this process, their calls, and how far results may be from the fp64 oracle's."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from fasterase.ops.contrastive import available_backends, contrastive
from fasterase.ops.contrastive.operator import Batch
from tests import oracle

INPUTS = ("image", "text", "scale")
# With TRITON_INTERPRET=1 tests run on the Triton kernels in NumPy, else on all other backends.
IS_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
BACKENDS = tuple(name for name in available_backends() if (name == "triton") == IS_INTERPRETED)
assert BACKENDS == ("triton",) or not IS_INTERPRETED, "without kernels nothing would be tested"
TILED = tuple(name for name in BACKENDS if name != "dense")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tiled_backend = pytest.mark.parametrize("backend", TILED)
# Only without a compiler: kernels that do not compile must fail here, not be passed over.
COMPILER = os.environ.get("CXX", "c++")
needs_kernels = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} here")
# The widest precision of these backends.
WIDE = torch.float32 if IS_INTERPRETED else torch.float64
# By backend, in fp32. Upstream gradients are N(0, 1) a sample, not 1/N, so that almost no gradient
# hides below the floor of `relative_error`; autograd's plain fp32 then errs up to 2.4e-4 (labels,
# N = 1031, scale 14.3).
TOLERANCE = {"dense": 4e-4, "chunked": 2e-4, "cpu": 3e-4, "triton": 3e-4}


def rounded(batch, dtype=torch.float32):
    """The batch as `dtype` holds it, so that the oracle sees what the operator sees."""
    for name in ("image", "text", "ref_image", "ref_text"):
        value = getattr(batch, name)
        if value is not None:
            setattr(batch, name, torch.tensor(value).to(dtype).double().numpy())
    batch.scale = float(np.float32(batch.scale))
    return batch


def tensors(batch, dtype=torch.float32, *, scale_dtype=torch.float64, device="cpu"):
    """Keyword arguments of a call, the differentiable ones first; fp32 holds the batch exactly."""

    def tensor(name):
        is_scale = name.endswith("scale")
        return torch.tensor(
            getattr(batch, name), dtype=scale_dtype if is_scale else dtype, device=device
        )

    call = {name: tensor(name).requires_grad_() for name in INPUTS}
    if batch.ref_image is not None:
        call |= {name: tensor(name) for name in ("ref_image", "ref_text", "ref_scale")}
    if batch.labels is not None:
        call["labels"] = torch.tensor(batch.labels, device=device)
    return call


def make(
    n=40,
    width=8,
    scale=30.0,
    *,
    dtype=torch.float32,
    ref_width=None,
    labels=None,
    cones=False,
    reference=True,
    seed=0,
    device="cpu",
):
    """(call, batch): a call's arguments and, for the oracle, the same as `dtype` holds it.

    Args:
        labels: how many different ones, None for no labels.
        cones: images in one and texts in the opposite one, where a fixed shift loses every term.
    """
    gap = 5.0 if cones else 0.0
    batch = oracle.clip_like(
        n, width, scale, ref_width=ref_width, num_labels=labels, modality_gap=gap, seed=seed
    )
    batch.ref_scale = 100.0 if cones else 20.0
    batch = rounded(batch.rows(slice(n), reference=reference), dtype)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return tensors(batch, dtype, scale_dtype=scale_dtype, device=device), batch


def arguments(call, *, detached=True):
    """The tensors of a call in the order of the operators' arguments."""
    given = [call.get(name) for name in Batch._fields]
    return [x.detach() if detached and x is not None else x for x in given]


def leaves(call):
    return [call[name] for name in INPUTS if call[name].requires_grad]


def run(call, upstream, groups=None, backend="auto"):
    """Losses and the gradients of (upstream * losses).sum() in image, text and scale."""
    losses = [x for x in contrastive(**call, groups=groups, backend=backend) if x is not None]
    total = sum(
        (torch.tensor(w, device=x.device) * x.double()).sum()
        for w, x in zip(upstream, losses, strict=False)
    )
    return losses, torch.autograd.grad(total, leaves(call))


def relative_error(found, expected, scale):
    """Of each value, or of 1e-2 x max(1, scale / 10) where the value is smaller."""
    expected = np.asarray(expected)
    error = np.abs(found.detach().double().cpu().numpy() - expected)
    floor = 1e-2 * max(1.0, scale / 10)
    return float((error / np.maximum(np.abs(expected), floor)).max(initial=0.0))


def norm_error(found, expected):
    error = np.linalg.norm(found.detach().double().cpu().numpy() - expected)
    return float(error / np.linalg.norm(expected))


def assert_same_bits(left, right):
    """Of two sequences of tensors."""
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def check(
    backend,
    call,
    batch,
    groups=None,
    *,
    tolerance=None,
    cones=False,
    rounded_once=False,
    call_it=run,
):
    """Hold losses and gradients to the oracle's; gradients of half precision, to a few roundings.

    With `rounded_once` each number of these is held to a single one, that of its dtype.

    Logits of opposite `cones` near -95 carry 1e-5 of fp32 rounding, which the weight of a whole
    direction multiplies by 100: their weights are 1 / sqrt(N), between a mean's and a sample's.
    """
    dtype, n, scale = call["image"].dtype, len(batch.image), batch.scale
    if tolerance is None:
        tolerance = 5e-4 if cones else TOLERANCE[backend]
        tolerance = 1e-10 if dtype == torch.float64 else tolerance
    upstream = (n**-0.5 if cones else 1.0) * np.random.default_rng(3).normal(size=(4, n))
    losses, gradients = call_it(call, upstream, groups, backend)
    expected, exact = oracle.contrastive(batch, upstream, groups)
    for found, value in zip(losses, expected, strict=False):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(found, value, scale) < tolerance
    assert [x.dtype for x in gradients[:2]] == [dtype, dtype]
    if dtype in (torch.float32, torch.float64):
        for found, value in zip(gradients, (exact.image, exact.text, exact.scale), strict=True):
            assert relative_error(found, value, scale) < tolerance
        return
    epsilon = torch.finfo(dtype).eps
    for found, value in zip(gradients[:2], (exact.image, exact.text), strict=True):
        assert norm_error(found, value) < (8 if cones else 2) * epsilon
        if rounded_once:
            assert relative_error(found, value, scale) < epsilon / 2 + tolerance
    # A sum over cosines of either sign: its error counts against the terms, not the result.
    terms = np.abs(batch.image * exact.image).sum() / scale
    assert abs(gradients[2].item() - exact.scale) < epsilon * terms
