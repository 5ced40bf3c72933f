"""Half-precision products under the interpreter; test_contrastive_triton.py runs this too."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import fasterase
from fasterase import losses
from fasterase.engine.loss import StepLoss, StepPairs, loss_products
from fasterase.objective import Objective, weighted_erase_loss
from fasterase.ops.contrastive import contrastive, explain_backend, triton_plan
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive.triton_launch import Launcher
from tests import oracle
from tests.marks import SHORT_RUN
from tests.ops import triton_checks
from tests.ops.calls import norm_error
from tests.ops.triton_checks import batch_on, run, small_tiles  # noqa: F401, a fixture
from tests.tiny_model import erase

FP32, FP16 = torch.float32, torch.float16

pytestmark = triton_checks.INTERPRETED


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
    call, _ = batch_on("cpu", FP32, 50, 64, 48, 14.3)
    order = ("image", "text", "scale", "ref_image", "ref_text", "ref_scale")
    inputs = [call[k] for k in order[: 3 if name == "ClipLoss" else 6]]
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
    call, batch = batch_on("cpu", FP32, 50, 64, 48, 14.3)
    lengths = image_length, text_length
    with torch.no_grad():
        for name, length in zip(("image", "text"), lengths, strict=True):
            call[name].mul_(length)
            setattr(batch, name, call[name].double().numpy())
        call["scale"] /= image_length * text_length
        batch.scale = call["scale"].item()
    call["products"] = "fp16"
    upstream = np.ones((4, 50)) / 50
    found, gradients = run(call, upstream, groups)
    expected, exact = oracle.contrastive(batch, upstream, groups)
    for loss, value in zip(found, expected, strict=True):
        torch.testing.assert_close(
            loss.mean(), torch.tensor(value.mean()).float(), rtol=5e-3, atol=0
        )
    for name, gradient in zip(("image", "text"), gradients, strict=False):
        assert norm_error(gradient, getattr(exact, name)) < 5e-3
    assert abs(gradients[2].item() / exact.scale - 1) < 5e-3


def test_a_row_of_nan_leaves_long_rows_of_other_groups_alone():
    call, _ = batch_on("cpu", FP32, 30, 8, 8, 1e-4)
    with torch.no_grad():
        call["image"].mul_(1e6)
        call["image"][4, 2] = torch.nan
    found = contrastive(**call, groups=(10, 20), products="fp16", backend="triton")
    assert all(bool(x[:10].isnan().any()) for x in found)
    assert all(bool(x[10:].isfinite().all()) for x in found)


def test_products_of_a_call(monkeypatch):
    call, _ = batch_on("cpu", FP32, 6, 4, 4, 1.0)

    def products(**changed):
        return explain_backend(**(call | {"backend": "triton"} | changed)).products

    assert products() == products(products="fp32") == "fp32"
    assert products(products="fp16") == "fp16"
    assert products(products="bf16") == "bf16"
    halves = {k: call[k].detach().half() for k in ("image", "text", "ref_image", "ref_text")}
    assert products(**halves) == products(**halves, products="fp32") == "fp16"
    halves["ref_text"] = call["ref_text"]
    assert products(**halves) == "fp32"  # never one of them alone
    monkeypatch.setattr("fasterase.ops.contrastive.checks.allows_tf32", lambda: True)
    assert products() == "tf32"
    assert products(products="fp32") == "fp32"
    assert str(explain_backend(**call, backend="triton")).startswith("triton, tf32 products: ")


@pytest.mark.usefixtures("autocast")
def test_autocast_and_compile():
    call, _ = batch_on("cpu", FP32, 20, 8, 8, 14.3)
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
    call, _ = batch_on("cpu", FP32, 20, 8, 8, 14.3)
    assert torch.get_float32_matmul_precision() == "highest"
    before = matmul.fp32_precision
    try:
        if setting == "medium":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = "tf32"
        run(call | {"products": products}, np.ones((4, 20)), None)
        assert matmul.fp32_precision == "tf32"
        if setting == "medium":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if setting == "medium":
            torch.set_float32_matmul_precision("highest")
        else:
            matmul.fp32_precision = before
    assert found == {"tf32" if products == "auto" else "ieee"}
