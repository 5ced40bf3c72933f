"""Checks of the Triton backend that its tests run under the interpreter and on a GPU alike."""

from __future__ import annotations

import numpy as np
import torch

from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive.checks import resolve_products
from fasterase.ops.contrastive.operator import Batch
from tests.ops.calls import arguments, assert_same_bits, check, make, norm_error, run


def check_torch_tiles(dtype, n, width, groups, *, device="cpu", tolerance, **options):
    """Against `"chunked"` in fp32."""
    call, _ = make(n, width, 14.3, dtype=dtype, ref_width=64, device=device, **options)
    upstream = np.random.default_rng(0).normal(size=(4, n))
    losses, gradients = run(call, upstream, groups, "triton")
    wide = {k: v.detach().float().requires_grad_(v.requires_grad) for k, v in call.items()}
    exact, expected = run(wide, upstream, groups, "chunked")
    torch.testing.assert_close(losses, exact, rtol=tolerance, atol=tolerance / 10)
    for left, right in zip(gradients[:2], expected[:2], strict=True):
        error = norm_error(left, right.double().cpu().numpy())
        assert error < max(tolerance, 2 * torch.finfo(dtype).eps)


def check_guard(dtype, n, groups, *, device="cpu"):
    """Opposite cones fire it in both groups."""
    call, batch = make(n, 64, 100.0, dtype=dtype, cones=True, device=device)
    assert flags(call, groups) == [1, 1]
    check("triton", call, batch, groups, cones=True)


def check_nothing_beyond_is_read(dtype, n, width, ref_width, groups, *, device="cpu"):
    call, _ = make(n, width, 100.0, dtype=dtype, ref_width=ref_width, device=device)
    upstream = np.ones((4, n))
    held = {k: poisoned(v) if v.dim() == 2 else v for k, v in call.items()}
    runs = (run(each, upstream, groups, "triton") for each in (call, held))
    for left, right in zip(*runs, strict=True):
        assert_same_bits(left, right)


def poisoned(rows):
    """The same rows, in the middle of NaN."""
    buffer = torch.full((len(rows) + 70, rows.shape[1] + 70), torch.nan).to(rows)
    inside = buffer[: len(rows), : rows.shape[1]]
    inside.copy_(rows.detach())
    return inside.requires_grad_(rows.requires_grad)


def flags(call, groups):
    """Return for each group whether the guard fired."""
    batch = Batch(*arguments(call))
    products = resolve_products("auto", "triton", (batch.image, batch.ref_image))
    return triton_backend.forward(batch, groups, products)[2].tolist()
