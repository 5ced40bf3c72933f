"""The Triton kernels under the interpreter; test_contrastive_triton.py runs this in a process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl

from fasterase.errors import InputError
from fasterase.kernels import contrastive_gradients, contrastive_layout
from fasterase.ops.contrastive import (
    available_backends,
    contrastive,
    explain_backend,
    triton_plan,
    weighted_contrastive,
)
from fasterase.ops.contrastive import triton as triton_backend
from tests.ops import criterion_checks, triton_checks
from tests.ops.calls import norm_error
from tests.ops.test_contrastive import (  # noqa: F401, over the backends of this process
    test_a_matched_pair_keeps_its_tiny_cross_entropy,
    test_autocast_changes_nothing,
    test_inputs_without_gradient,
    test_nan_and_infinite_scales_do_not_give_numbers,
    test_nan_stays_nan_and_in_its_group,
    test_second_backward_over_a_retained_graph,
    test_small_groups,
)
from tests.ops.triton_checks import (  # noqa: F401, a fixture
    batch_on,
    check,
    check_guard,
    check_nothing_beyond_is_read,
    check_torch_tiles,
    flags,
    run,
    small_tiles,
)

FP32, FP16 = torch.float32, torch.float16

pytestmark = triton_checks.INTERPRETED


@pytest.fixture
def two_slots(monkeypatch):
    """At most 2 x 2 rectangles a group, so that each has several row and column blocks."""
    for module in (contrastive_layout, contrastive_gradients, triton_plan, triton_backend):
        monkeypatch.setattr(module, "SLOTS", tl.constexpr(2))


@pytest.fixture
def short_strips(monkeypatch):
    """A row block a strip."""
    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(triton_plan, "LEAST_STRIP_ROWS", 1)


# Multiples of no tile, of some, of all; widths below, at and above BLOCK_K; groups of very
# different sizes, none and one pair among them.
@pytest.mark.parametrize(
    ("dtype", "n", "width", "ref_width", "scale", "groups", "labels"),
    [
        (FP32, 123, 80, 48, 14.3, None, None),
        (FP16, 123, 80, 48, 100.0, (0, 123), 60),
        (FP32, 67, 33, 33, 100.0, (3, 64), 20),
        (FP16, 67, 33, 33, 14.3, None, None),
        (FP32, 130, 64, 96, 100.0, (130, 0), None),
        (FP16, 130, 64, 96, 14.3, (1, 2, 127), 90),
        (FP32, 65, 128, 128, 14.3, (64, 1), None),
        (FP16, 65, 128, 128, 100.0, None, None),
        (FP32, 6, 1, 1, 30.0, (2, 1, 0, 3), None),
    ],
)
def test_matches_the_oracle(dtype, n, width, ref_width, scale, groups, labels):
    check("cpu", dtype, n, width, ref_width, scale, groups, labels=labels)


# All of the small shapes, one of the large one, which takes seconds; options and labels in turn.
@pytest.mark.parametrize("index", range(9))
def test_near_the_oracle_and_no_worse_than_eager(index):
    shape, scale, _ = criterion_checks.CASES[2 * index]
    options = criterion_checks.OPTIONS[index % 4]
    criterion_checks.check("triton", shape, scale, index // 2 % 2 == 0, **options)


@pytest.mark.usefixtures("two_slots")
def test_rectangles_of_several_blocks_and_backwards_of_several_strips(monkeypatch):
    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", 110 * 320 * FP16.itemsize)
    monkeypatch.setattr(triton_plan, "LEAST_STRIP_ROWS", 1)
    check("cpu", FP16, 300, 320, 200, 14.3, (300,), labels=200)


@pytest.mark.usefixtures("two_slots")
def test_opposite_cones_fire_the_guard():
    check_guard("cpu", FP16, 160, (20, 140))


def test_the_guard_is_a_group_s_own():
    call, _ = batch_on("cpu", FP32, 60, 32, 16, 100.0)
    with torch.no_grad():
        call["image"][20:] = -call["text"][20]
        call["text"][20:] = call["text"][20]
    assert flags(call, (1, 19, 40)) == [0, 0, 1]


@pytest.mark.usefixtures("two_slots")
@pytest.mark.parametrize(
    ("dtype", "n", "width", "groups", "strip_rows"),
    [
        (FP32, 50, 24, (20, 30), 50),
        (FP32, 170, 70, (37, 133), 170),
        (FP16, 170, 64, (0, 170), 100),
        (FP16, 161, 33, (1, 160), 161),
    ],
)
def test_without_reference(dtype, n, width, groups, strip_rows, monkeypatch):
    """Items, strips and runs of one tile and of several."""
    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", strip_rows * 192 * dtype.itemsize)
    monkeypatch.setattr(triton_plan, "LEAST_STRIP_ROWS", 1)
    check_torch_tiles("cpu", dtype, n, width, groups, has_ref=False, tolerance=1e-4)


def test_nothing_beyond_the_tensors_is_read():
    check_nothing_beyond_is_read("cpu", FP32, 45, 20, 12, (15, 30))


def test_columns_stored_first_and_mixed_precisions():
    call, _ = batch_on("cpu", FP32, 45, 20, 12, 14.3)
    clean = contrastive(**call, backend="triton")
    call["image"] = call["image"].detach().T.contiguous().T
    call["ref_text"] = call["ref_text"].double()
    assert all(map(torch.equal, clean, contrastive(**call, backend="triton")))
    call["image"] = call["image"].half()
    mixed = contrastive(**call, backend="triton")
    assert all(x.dtype == FP32 for x in mixed)


def test_the_same_bits_every_time():
    call, _ = batch_on("cpu", FP16, 70, 40, 24, 100.0)
    upstream = np.random.default_rng(0).normal(size=(4, 70))
    first, second = (run(call, upstream, (30, 40)) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        assert all(map(torch.equal, left, right))


def test_torch_operator_and_compile():
    call, _ = batch_on("cpu", FP32, 20, 8, 8, 14.3)
    names = ("image", "text", "scale", "ref_image", "ref_text", "ref_scale")
    contrastive(**call, backend="triton")
    operator = torch.ops.fasterase.contrastive_triton_interpreted.default
    backward = torch.ops.fasterase.contrastive_triton_interpreted_backward.default
    step = torch.ops.fasterase.contrastive_triton_interpreted_step.default
    held = [call[k].detach() for k in names]
    torch.library.opcheck(operator, (*(call[k] for k in names), [8, 12], "fp16"))
    upstream, *saved = operator(*held, [8, 12], "fp16")
    wanted = True, False, True, True
    torch.library.opcheck(backward, (upstream, *held, *saved, [8, 12], *wanted, "fp16"))
    torch.library.opcheck(step, (upstream, *held, [8, 12], *wanted, "fp16"))

    def losses(image, text, scale):
        rest = {k: call[k] for k in names[3:]}
        return contrastive(image, text, scale, **rest, groups=(8, 12), backend="triton")

    arguments = [call[k] for k in names[:3]]
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(*arguments)
    plain = losses(*arguments)
    assert all(map(torch.equal, compiled, plain))
    gradients = [torch.autograd.grad(x.ce_row.sum(), arguments) for x in (compiled, plain)]
    assert all(map(torch.equal, *gradients))


# Whole or in strips; one group, two, three; the guard fires in the first case's.
@pytest.mark.parametrize(
    ("dtype", "groups", "gap", "strips"),
    [
        (FP32, (20, 50), 5.0, "short_strips"),
        (FP32, None, 0.0, "short_strips"),
        (FP16, (3, 30, 37), 0.0, "small_tiles"),
        (FP16, (30, 40), 0.0, "short_strips"),
    ],
)
def test_a_step_that_knows_its_weights(dtype, groups, gap, strips, request):
    """Its KLs come from the strips of G; a GradScaler's factor arrives before the rounding."""
    request.getfixturevalue(strips)
    call, _ = batch_on("cpu", dtype, 70, 40, 24, 100.0, gap=gap)
    call |= {"groups": groups, "backend": "triton"}
    inputs = [call[k] for k in ("image", "text", "scale")]
    weights = torch.tensor(np.random.default_rng(0).normal(size=(4, 70)), dtype=FP32) / 2**20
    losses = contrastive(**call)
    plain = torch.autograd.grad(65536.0 * (weights * torch.stack(losses)).sum(), inputs)
    compiled = torch.compile(weighted_contrastive, fullgraph=True, backend="aot_eager")
    found = [function(weights=weights, **call) for function in (weighted_contrastive, compiled)]
    assert all(map(torch.equal, found[0].losses, found[1].losses))
    for left, right in zip(found[0].losses, losses, strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(65536.0 * x.total, inputs) for x in found]
    assert all(map(torch.equal, *gradients))
    assert [x.dtype for x in gradients[0]] == [dtype, dtype, FP32]
    for left, right in zip(gradients[0], plain, strict=True):
        assert norm_error(left, right.double().numpy()) < (1e-5 if dtype == FP32 else 1e-3)


def test_gradients_agree_with_losses_at_logits_of_a_million():
    """Where an fp32 logit is off by .1: S of the losses and S of the gradients are the same."""
    call, _ = batch_on("cpu", FP32, 40, 64, 32, 1e6)
    # Rows of p - 1 add up to 0: the sum over j of G_ij T_j is 0 if all texts are one.
    call["text"] = call["text"].detach()[:1].expand(40, -1).contiguous()
    losses = contrastive(**call, backend="triton")
    (d_image,) = torch.autograd.grad(losses.ce_row.sum(), call["image"])
    assert d_image.abs().max() < 1e-6 * 1e6


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 has the setting"
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_products_follow_the_precision_set_for_cuda(precision):
    """Set that way, `torch.get_float32_matmul_precision` raises."""
    call, _ = batch_on("cpu", FP32, 6, 4, 4, 1.0)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        found = explain_backend(**call, backend="triton").products
        assert found == {"ieee": "fp32", "tf32": "tf32"}[precision]
        contrastive(**call, backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_backend_is_named_and_refuses_fp64():
    assert "triton" in available_backends()
    call, _ = batch_on("cpu", FP32, 6, 4, 4, 1.0)
    assert explain_backend(**call, backend="triton").name == "triton"
    for name in ("image", "text"):
        call[name] = call[name].double()
    with pytest.raises(InputError, match="float64"):
        contrastive(**call, backend="triton")
