"""Special to the C++ backend: threads, kept logits, strides, and products in bf16.

Where there is no AMX those run in plain loops: all but the kernel.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fasterase.errors import InputError
from fasterase.ops.contrastive import api, contrastive, cpu, explain_backend, weighted_contrastive
from fasterase.ops.contrastive.dense import contrastive_dense
from tests import oracle
from tests.ops import calls
from tests.ops.calls import (
    INPUTS,
    arguments,
    assert_same_bits,
    check,
    leaves,
    make,
    needs_kernels,
    norm_error,
)

pytestmark = needs_kernels


def loss(call, backend="cpu"):
    """The weighted mean of all four losses."""
    losses = contrastive(**call, backend=backend)
    return sum(weight * x.mean() for weight, x in enumerate(losses, 1))


def gradients(call, backend="cpu"):
    """The loss and its gradients."""
    total = loss(call, backend)
    return (total, *torch.autograd.grad(total, leaves(call)))


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (2, 2), (3, 3), (3, 1)])
def test_threads_change_the_tiles_but_hardly_the_numbers(forward, backward):
    call, _ = make(300, 64)
    expected = gradients(call, "chunked")
    before = torch.get_num_threads()
    runs = []
    try:
        for _ in range(2):
            torch.set_num_threads(forward)
            total = loss(call)
            torch.set_num_threads(backward)
            runs.append((total, *torch.autograd.grad(total, leaves(call))))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*runs)
    torch.testing.assert_close(runs[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.99])
def test_kept_logits_change_no_bit(share, monkeypatch):
    call, _ = make(100, 8)
    monkeypatch.setattr(cpu, "_TILE", 16)
    expected = gradients(call)
    monkeypatch.setattr(cpu, "_KEPT_BYTES", int(share * 2 * 100 * 100 * 4))
    assert_same_bits(gradients(call), expected)


def test_graphs_alive_at_once_share_no_kept_logits():
    """The memory of a finished step serves the next one, and only then. 3 MB: large enough to."""
    batches = [make(n, 8, seed=seed)[0] for seed, n in enumerate((620, 620, 620, 300))]
    expected = [gradients(call)[1:] for call in batches]
    for _ in range(2):
        totals = [loss(call) for call in batches]
        for call, total, exact in zip(batches, totals, expected, strict=True):
            assert_same_bits(torch.autograd.grad(total, leaves(call)), exact)


def test_rows_may_overlap():
    call, _ = make(70, 8)
    windows = torch.randn(77).unfold(0, 8, 1)
    for overlapping in (windows, windows[:1].expand(70, 8), windows.half()):
        for name in ("image", "text"):
            copied = overlapping.clone().requires_grad_()
            found = gradients(call | {name: overlapping.detach().requires_grad_()})
            assert_same_bits(found, gradients(call | {name: copied}))


@pytest.mark.parametrize(("n", "width"), [(1, 8), (4, 0)])
def test_blas_is_given_no_stride_that_it_refuses(n, width, capfd):
    """It would say so, and compute nothing."""
    image, text = (
        torch.ones(n * width).as_strided((n, width), (1, n)).requires_grad_() for _ in range(2)
    )
    losses = contrastive(image, text, torch.tensor(3.0, requires_grad=True), backend="cpu")
    (losses.ce_row + losses.ce_col).sum().backward()
    assert losses.ce_row.tolist() == pytest.approx([math.log(n)] * n)
    assert image.grad.shape == (n, width)
    assert not any(capfd.readouterr())


def test_small_numbers_survive_the_library():
    """-ffast-math in a shared library would flush them to zero for the whole process."""
    assert (torch.tensor([1e-40]) * torch.tensor([1.0])).item() > 0


def test_auto_takes_it_for_cpu_tensors():
    assert explain_backend(**make()[0]).name == "cpu"


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(cpu, "load_kernels", lambda: None)
    elsewhere = torch.empty(2, 2, device="meta")
    with pytest.raises(InputError, match="takes CPU tensors; image is on meta"):
        api.choose_backend("cpu", (elsewhere, elsewhere))


def test_fake_tensors_pass_through_losses_and_gradients():
    with FakeTensorMode():
        call = [torch.randn(shape, requires_grad=True) for shape in ((12, 8), (12, 8), ())]
        losses = contrastive(*call, labels=torch.arange(12) // 2, backend="cpu")
        (losses.ce_row + losses.ce_col).sum().backward()
    assert losses.ce_row.shape == (12,)
    assert losses.kl_row is None
    assert [x.grad.shape for x in call] == [(12, 8), (12, 8), ()]


@pytest.fixture
def amx(monkeypatch):
    """Products as on a CPU with AMX, in several ragged tiles."""
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(cpu, "_TILE", 96)


def run_weighted(call, upstream, groups, backend):
    weights = torch.tensor(upstream, dtype=torch.float32)
    made = weighted_contrastive(**call, weights=weights, groups=groups, backend=backend)
    return made.losses, torch.autograd.grad(made.total, leaves(call))


# 507: no even depth; 1280: wider than long; two opposite cones: every row has its own shift.
@pytest.mark.parametrize(
    ("n", "width", "scale", "labels", "groups", "cones"),
    [
        (252, 507, 14.3, None, None, False),
        (252, 40, 100.0, 60, (100, 0, 1, 151), False),
        (37, 16, 1.0, 5, (0, 37), False),
        (130, 1280, 100.0, None, None, False),
        (252, 64, 100.0, None, (100, 152), True),
    ],
)
def test_bf16_features_match_the_oracle(amx, monkeypatch, n, width, scale, labels, groups, cones):
    """Their exact products are summed in fp32: only gradients are rounded, to a few roundings."""
    options = {"dtype": torch.bfloat16, "ref_width": 24, "labels": labels, "cones": cones}
    call, batch = make(n, width, scale, **options)
    check("cpu", call, batch, groups, cones=cones)
    monkeypatch.setattr(cpu, "_KEPT_BYTES", 4 * sum(k * k for k in groups or (n,)))  # half
    check("cpu", call, batch, groups, cones=cones, call_it=run_weighted)


def test_fp32_features_are_rounded_once_and_sums_are_fp32(amx):
    """Nearer to fp64 than torch's own bf16, whose logits are bf16 too; the diagonal is exact."""
    n, groups = 150, (50, 100)
    call, batch = make(n, 512, 100.0)
    upstream = np.full((4, n), 1 / n)
    losses, gradients = calls.run(call | {"products": "bf16"}, upstream, groups, "cpu")
    values, exact = oracle.contrastive(batch, upstream, groups)
    eager = [x.bfloat16() for x in arguments(call)]
    sides = [x.requires_grad_() for x in eager[:2]]
    naive = torch.stack(contrastive_dense(*eager, groups))
    slopes = torch.autograd.grad((naive / n).sum(), sides)
    for found, other, value in zip(losses, naive, values, strict=True):
        error, its = (np.abs(x.detach().double().numpy() - value).max() for x in (found, other))
        assert error < 0.1 * its
    for name, found, other in zip(INPUTS[:2], gradients, slopes, strict=False):
        error, its = (norm_error(x, getattr(exact, name)) for x in (found, other))
        assert 1e-5 < error < 0.5 * its


def test_two_equal_models_have_no_kl(amx):
    call, _ = make(40, 16, 50.0)
    same = {f"ref_{name}": call[name].detach() for name in INPUTS}
    losses = contrastive(**call | same, backend="cpu", products="bf16")
    assert torch.stack(losses[2:]).abs().max() < 1e-6


def test_nan_stays_in_its_row_and_group(amx):
    call, _ = make(150, 8, 100.0, dtype=torch.bfloat16)
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
