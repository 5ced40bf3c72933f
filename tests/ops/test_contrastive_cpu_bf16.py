"""The C++ backend's bf16 products, in plain loops where there is no AMX: all but the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterase.ops.contrastive import contrastive, cpu, explain_backend, weighted_contrastive
from fasterase.ops.contrastive.dense import contrastive_dense
from tests import oracle
from tests.ops import calls
from tests.ops.calls import INPUTS, norm_error, relative_error, rounded, tensors
from tests.ops.test_contrastive_cpu import needs_kernels

pytestmark = needs_kernels
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def amx(monkeypatch):
    """Products as on a CPU with AMX, in several ragged tiles."""
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(cpu, "_TILE", 96)


def run_weighted(call, upstream, groups):
    made = weighted_contrastive(
        **call, weights=torch.tensor(upstream, dtype=torch.float32), groups=groups, backend="cpu"
    )
    return made.losses, torch.autograd.grad(made.total, [call[name] for name in INPUTS])


# 507: no even depth; 1280: wider than long; two opposite cones: every row has its own shift.
@pytest.mark.parametrize(
    ("n", "width", "scale", "labels", "groups", "gap"),
    [
        (252, 507, 14.3, None, None, 0.0),
        (252, 40, 100.0, 60, (100, 0, 1, 151), 0.0),
        (37, 16, 1.0, 5, (0, 37), 0.0),
        (130, 1280, 100.0, None, None, 0.0),
        (252, 64, 100.0, None, (100, 152), 5.0),
    ],
)
def test_bf16_features_match_the_oracle(amx, monkeypatch, n, width, scale, labels, groups, gap):
    """Their exact products are summed in fp32: only gradients are rounded, to a few roundings."""
    batch = oracle.clip_like(n, width, scale, ref_width=24, num_labels=labels, modality_gap=gap)
    batch.ref_scale = 100.0 if gap else 20.0
    call = tensors(rounded(batch, torch.bfloat16), torch.bfloat16)
    upstream = (n**-0.5 if gap else 1.0) * np.random.default_rng(3).normal(size=(4, n))
    expected, exact = oracle.contrastive(batch, upstream, groups)
    terms = np.abs(batch.image * exact.image).sum() / scale
    whole = calls.run(call, upstream, groups, "cpu")
    monkeypatch.setattr(cpu, "_KEPT_BYTES", 4 * sum(k * k for k in groups or (n,)))  # half
    for losses, gradients in (whole, run_weighted(call, upstream, groups)):
        for found, value in zip(losses, expected, strict=True):
            assert relative_error(found, value, scale) < (5e-4 if gap else 3e-4)
        for name, found in zip(("image", "text"), gradients, strict=False):
            assert found.dtype == torch.bfloat16
            assert norm_error(found, getattr(exact, name)) < (8 if gap else 2) * EPS
        assert abs(gradients[2].item() - exact.scale) < EPS * terms


def test_fp32_features_are_rounded_once_and_sums_are_fp32(amx):
    """Nearer to fp64 than torch's own bf16, whose logits are bf16 too; the diagonal is exact."""
    n, scale = 150, 100.0
    batch = rounded(oracle.clip_like(n, 512, scale))
    call = tensors(batch) | {"products": "bf16"}
    upstream = np.full((4, n), 1 / n)
    losses, gradients = calls.run(call, upstream, (50, 100), "cpu")
    values, exact = oracle.contrastive(batch, upstream, (50, 100))
    eager = {k: call[k].detach().bfloat16() for k in call if k != "products"}
    sides = [eager[name].requires_grad_() for name in INPUTS]
    naive = torch.stack(contrastive_dense(*eager.values(), (50, 100)))
    slopes = torch.autograd.grad((naive / n).sum(), sides)
    for found, other, value in zip(losses, naive, values, strict=True):
        error, its = (np.abs(x.detach().double().numpy() - value).max() for x in (found, other))
        assert error < 0.1 * its
    for name, found, other in zip(INPUTS[:2], gradients, slopes, strict=False):
        error, its = (norm_error(x, getattr(exact, name)) for x in (found, other))
        assert 1e-5 < error < 0.5 * its


def test_two_equal_models_have_no_kl(amx):
    call = tensors(oracle.clip_like(40, 16, 50.0))
    same = {f"ref_{name}": call[name].detach() for name in INPUTS}
    losses = contrastive(**call | same, backend="cpu", products="bf16")
    assert torch.stack(losses[2:]).abs().max() < 1e-6


def test_nan_stays_in_its_row_and_group(amx):
    call = tensors(oracle.clip_like(150, 8, 100.0), torch.bfloat16)
    with torch.no_grad():
        call["text"][130, 2] = torch.nan
    losses = contrastive(**call, groups=(50, 100), backend="cpu")
    assert all(bool(x[:50].isfinite().all()) for x in losses)
    assert losses.ce_col[50:].isnan().nonzero().tolist() == [[80]]
    total = sum(x[:50].sum() for x in losses)
    for gradient in torch.autograd.grad(total, [call["image"], call["text"]]):
        assert bool(gradient[:50].isfinite().all())
        assert not gradient[50:].any()


def test_products_are_named_only_where_they_are_used(monkeypatch):
    wide, half = torch.ones(4, 8), torch.ones(4, 8).bfloat16()

    def products(image, text, **options):
        return explain_backend(image, text, 1.0, backend="cpu", **options).products

    for has_amx, found in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(cpu, "multiplies_bf16", lambda has_amx=has_amx: has_amx)
        assert products(half, half) == products(wide, half, products="bf16") == found
        assert products(half, half, products="fp32") == products(wide, half) == "fp32"
        assert products(wide, wide, products="fp16") == "fp32"
        assert products(wide.double(), wide, products="bf16") == "fp64"
        reference = {"ref_image": wide, "ref_text": half, "ref_scale": 1.0}
        assert products(half, half, **reference) == "fp32"


def test_this_cpu_is_asked():
    """Where torch sees no AMX, the operator must not take its plain loops."""
    assert cpu.load_kernels() is None
    assert cpu.multiplies_bf16() <= torch.cpu._is_amx_tile_supported()
