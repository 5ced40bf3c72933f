"""Special to the Triton kernels, under the interpreter: strips, the guard, products in fp16.

test_contrastive_triton.py runs this in a process of its own, after the tests of all backends.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import triton.language as tl

import fasterase
from fasterase import losses
from fasterase.engine.loss import StepLoss, StepPairs, loss_products
from fasterase.errors import InputError
from fasterase.kernels import contrastive_gradients, contrastive_layout
from fasterase.objective import Objective, weighted_erase_loss
from fasterase.ops.contrastive import (
    contrastive,
    explain_backend,
    triton_plan,
    weighted_contrastive,
)
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive.triton_launch import Launcher
from tests import oracle
from tests.marks import SHORT_RUN
from tests.ops.calls import (
    arguments,
    check,
    leaves,
    make,
    norm_error,
    run,
)
from tests.ops.triton_checks import (
    check_guard,
    check_nothing_beyond_is_read,
    check_torch_tiles,
    flags,
)
from tests.tiny_model import erase

FP32, FP16 = torch.float32, torch.float16


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


@pytest.mark.usefixtures("two_slots")
def test_rectangles_of_several_blocks_and_backwards_of_several_strips(monkeypatch):
    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", 110 * 320 * FP16.itemsize)
    monkeypatch.setattr(triton_plan, "LEAST_STRIP_ROWS", 1)
    call, batch = make(300, 320, 14.3, dtype=FP16, ref_width=200, labels=200)
    check("triton", call, batch, (300,))


@pytest.mark.usefixtures("two_slots")
def test_opposite_cones_fire_the_guard():
    check_guard(FP16, 160, (20, 140))


def test_the_guard_is_a_group_s_own():
    call, _ = make(60, 32, 100.0, ref_width=16)
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
    check_torch_tiles(dtype, n, width, groups, reference=False, tolerance=1e-4)


def test_nothing_beyond_the_tensors_is_read():
    check_nothing_beyond_is_read(FP32, 45, 20, 12, (15, 30))


def test_mixed_precisions():
    call, _ = make()
    call["image"] = call["image"].half()
    assert {x.dtype for x in contrastive(**call, backend="triton")} == {FP32}


# Whole or in strips; one group, two, three; the guard fires in the first case's.
@pytest.mark.parametrize(
    ("dtype", "groups", "cones", "strips"),
    [
        (FP32, (20, 50), True, "short_strips"),
        (FP32, None, False, "short_strips"),
        (FP16, (3, 30, 37), False, "small_tiles"),
        (FP16, (30, 40), False, "short_strips"),
    ],
)
def test_a_step_that_knows_its_weights(dtype, groups, cones, strips, request):
    """Its KLs come from the strips of G; a GradScaler's factor arrives before the rounding."""
    request.getfixturevalue(strips)
    call, _ = make(70, 40, 100.0, dtype=dtype, ref_width=24, cones=cones)
    inputs = leaves(call)
    call |= {"groups": groups, "backend": "triton"}
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
    call, _ = make(40, 64, 1e6, ref_width=32)
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
    call, _ = make(6, 4, 1.0)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        found = explain_backend(**call, backend="triton").products
        assert found == {"ieee": "fp32", "tf32": "tf32"}[precision]
        contrastive(**call, backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_backend_is_named_and_refuses_fp64():
    call, _ = make(6, 4, 1.0)
    assert explain_backend(**call, backend="triton").name == "triton"
    for name in ("image", "text"):
        call[name] = call[name].double()
    with pytest.raises(InputError, match="float64"):
        contrastive(**call, backend="triton")


@pytest.fixture
def multiplied(monkeypatch):
    """Dtypes of the features that the kernels of sums and strips got."""
    found = []
    made = triton_plan.Features.of.__func__

    def spy(cls, given, products):
        features = made(cls, given, products)
        found.append({features.image.dtype, features.text.dtype, features.ref_image.dtype})
        return features

    monkeypatch.setattr(triton_plan.Features, "of", classmethod(spy))
    return found


@pytest.fixture
def autocast(monkeypatch):
    """What `torch.autocast("cuda", torch.float16)` sets, on a machine that may have no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", FP16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def unit_features(n, width, *, moved):
    """(image, text, ref_image, ref_text): cosines of 0.1 between partners, all losses near 1."""
    rng = np.random.default_rng(3)
    shared, *noise = rng.normal(size=(5, n, width))
    towers = [shared / 3 + noise[k] for k in range(2)]
    sides = [*towers, *(towers[k] + moved * noise[k + 2] for k in range(2))]
    return [torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True)).float() for x in sides]


def step(features, backend, dtype, products):
    """(terms, gradients) of an engine's step."""
    objective = Objective(
        negatives="joint",
        forget_loss="contrastive",
        forget_weight=0.5,
        backend=backend,
        products=products,
    )
    image, text, ref_image, ref_text = (side.to(dtype) for side in features)
    scale = torch.tensor(100.0, dtype=dtype)
    pairs = StepPairs(16, torch.arange(len(image)) // 2, ref_image, ref_text, scale)
    found = StepLoss(objective)(image, text, scale, pairs, torch.ones((), dtype=dtype))
    return found.loss, (found.image, found.text, found.scale)


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_an_engine_s_step_with_fp16_products(moved, multiplied):
    """At the start, where current and original are the same, the KL is 0."""
    features = unit_features(60, 512, moved=moved)
    loss, gradients = step(features, "triton", FP32, loss_products("bf16"))
    expected, exact = step(features, "dense", torch.float64, "auto")
    assert multiplied
    assert all(dtypes == {FP16} for dtypes in multiplied)
    for found, value in zip(loss[:3], expected[:3], strict=True):
        assert abs(value) > 0.1
        assert abs(found - value) < 2e-3 * abs(value)
    kl = expected.consistency
    assert (kl > 0.1) == (moved > 0)
    assert abs(loss.consistency - kl) < max(2e-3 * kl, 1e-5)
    for found, value in zip(gradients, exact, strict=True):
        assert found.dtype == FP32
        assert norm_error(found, value.numpy()) < 5e-3


def test_an_original_may_share_a_tower_with_the_model():
    image, text, _, ref_text = unit_features(40, 32, moved=0.3)
    call = {"scale": 20.0, "ref_scale": 20.0, "backend": "triton", "products": "fp16"}
    same = contrastive(image, text, ref_image=image, ref_text=ref_text, **call)
    copied = contrastive(image, text, ref_image=image.clone(), ref_text=ref_text, **call)
    for found, expected in zip(same, copied, strict=True):
        torch.testing.assert_close(found, expected)


def test_launches_of_a_step(monkeypatch):
    """Where G fits one strip 10 for each set in use, forward and backward, beside two GEMMs."""
    launched = []

    def count(self, kernel, *arguments, **constants):
        launched.append(kernel)
        launch(self, kernel, *arguments, **constants)

    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", count)
    features = unit_features(30, 32, moved=0.3)
    for loss_of, expected in ((weighted_erase_loss, 10), (fasterase.erase_loss, 12)):
        for sets, options in enumerate(({}, {"forget_loss": "contrastive"}), 1):
            launched.clear()
            image, text = (side.detach().requires_grad_() for side in features[:2])
            options |= {"products": "fp16", "backend": "triton"}
            if loss_of is weighted_erase_loss:
                options = {"objective": Objective(**options)}
            loss = loss_of(image, text, 50.0, *features[2:], 50.0, n_forget=12, **options)
            loss.total.backward()
            assert len(launched) == sets * expected


@SHORT_RUN
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", FP32), ("bf16", FP16)])
def test_unlearn_asks_for_the_products_of_its_precision(precision, dtype, multiplied):
    erase(backend="triton", precision=precision, max_steps=1)
    assert multiplied == [{dtype}]  # one call for losses and gradients


@pytest.mark.parametrize("name", ["ClipLoss", "DistillClipLoss"])
@pytest.mark.usefixtures("autocast")
def test_losses_of_open_clip_under_autocast(name, multiplied, monkeypatch):
    call, _ = make(50, 64, 14.3, ref_width=48)
    inputs = arguments(call, detached=False)[: 3 if name == "ClipLoss" else 6]
    found = []
    for backend in ("dense", "triton"):
        for function in ("contrastive", "weighted_contrastive"):
            chosen = functools.partial(getattr(losses, function), backend=backend)
            monkeypatch.setattr(losses, function, chosen)
        terms = getattr(fasterase, name)()(*inputs)
        total = terms if name == "ClipLoss" else terms[0] + 3 * terms[1]
        found.append((total, torch.autograd.grad(total, inputs[:3])))
    assert multiplied
    assert all(dtypes == {FP16} for dtypes in multiplied)
    (total, gradients), (half_total, half_gradients) = found
    torch.testing.assert_close(half_total, total, rtol=1e-3, atol=0)
    for half, exact in zip(half_gradients, gradients, strict=True):
        assert half.dtype == FP32
        assert norm_error(half, exact.numpy()) < 5e-3


@pytest.mark.parametrize(("image_length", "text_length"), [(1e6, 1e-6), (3e-9, 1.0)])
@pytest.mark.parametrize("groups", [(50,), (20, 30)])
def test_rows_of_any_length_fit_fp16(image_length, text_length, groups):
    call, batch = make(50, 64, 14.3, ref_width=48)
    lengths = image_length, text_length
    with torch.no_grad():
        for name, length in zip(("image", "text"), lengths, strict=True):
            call[name].mul_(length)
            setattr(batch, name, call[name].double().numpy())
        call["scale"] /= image_length * text_length
        batch.scale = call["scale"].item()
    call["products"] = "fp16"
    upstream = np.ones((4, 50)) / 50
    found, gradients = run(call, upstream, groups, "triton")
    expected, exact = oracle.contrastive(batch, upstream, groups)
    for loss, value in zip(found, expected, strict=True):
        torch.testing.assert_close(
            loss.mean(), torch.tensor(value.mean()).float(), rtol=5e-3, atol=0
        )
    for name, gradient in zip(("image", "text"), gradients, strict=False):
        assert norm_error(gradient, getattr(exact, name)) < 5e-3
    assert abs(gradients[2].item() / exact.scale - 1) < 5e-3


def test_a_row_of_nan_leaves_long_rows_of_other_groups_alone():
    call, _ = make(30, 8, 1e-4)
    with torch.no_grad():
        call["image"].mul_(1e6)
        call["image"][4, 2] = torch.nan
    found = contrastive(**call, groups=(10, 20), products="fp16", backend="triton")
    assert all(bool(x[:10].isnan().any()) for x in found)
    assert all(bool(x[10:].isfinite().all()) for x in found)


@pytest.mark.usefixtures("autocast")
def test_autocast_and_compile():
    call, _ = make(20, 8, 14.3)
    assert explain_backend(**call, backend="triton").products == "fp16"
    assert explain_backend(**call, backend="triton", products="fp32").products == "fp32"
    call["image"] = call["image"].detach().bfloat16().requires_grad_()
    assert explain_backend(**call, backend="triton").products == "fp16"

    def total(image):
        return contrastive(**(call | {"image": image}), backend="triton").ce_row.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = [f(call["image"]) for f in (compiled, total)]
    assert torch.equal(*found)
    gradients = [torch.autograd.grad(x, call["image"])[0] for x in found]
    assert torch.equal(*gradients)
    assert gradients[0].dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["medium", "fp32_precision"])
@pytest.mark.parametrize("products", ["auto", "fp32"])
def test_exact_products_are_exact_in_cublas_too(products, setting, monkeypatch):
    """Whatever torch allows, by its older or newer setting; only "auto" follows it."""
    matmul = torch.backends.cuda.matmul
    multiply, found = triton_backend._multiply, set()

    def spy(*arguments, **options):
        found.add(matmul.fp32_precision)
        multiply(*arguments, **options)

    monkeypatch.setattr(triton_backend, "_multiply", spy)
    call, _ = make(20, 8, 14.3)
    assert torch.get_float32_matmul_precision() == "highest"
    before = matmul.fp32_precision
    try:
        if setting == "medium":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = "tf32"
        run(call | {"products": products}, np.ones((4, 20)), None, "triton")
        assert matmul.fp32_precision == "tf32"
        if setting == "medium":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if setting == "medium":
            torch.set_float32_matmul_precision("highest")
        else:
            matmul.fp32_precision = before
    assert found == {"tf32" if products == "auto" else "ieee"}
