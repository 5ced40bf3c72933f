"""`contrastive` on every backend against the fp64 oracle: values and gradients."""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fasterase.ops.contrastive import (
    api,
    available_backends,
    chunked,
    contrastive,
    cpu,
    weighted_contrastive,
)
from tests import oracle
from tests.ops import criterion_checks
from tests.ops.calls import INPUTS, relative_error, rounded, run, tensors

# On CPU tensors; contrastive_triton_interpreted.py runs some of these tests under the interpreter.
IS_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
BACKENDS = tuple(name for name in available_backends() if (name == "triton") == IS_INTERPRETED)
# Of each value, or of 1e-2 x max(1, scale / 10) where the value is smaller. Upstream gradients are
# N(0, 1) a sample, not 1/N, so that almost no gradient hides below that floor; autograd's plain
# fp32 then errs up to 2.4e-4 (labels, N = 1031, scale 14.3).
FP32 = {"dense": 4e-4, "cpu": 3e-4}
FP32_DEFAULT = 2e-4
# The widest precision of these backends, and its tolerance.
WIDE, WIDE_ERROR = (torch.float32, 3e-4) if IS_INTERPRETED else (torch.float64, 1e-10)

# (N, D), D0, scale, labels, groups. 252 and 507: multiples of no tile; 1031: three tiles, the last
# ragged; 37 x 16: one small tile; 1280: wider than long.
CASES = [
    ((252, 507), 507, 14.3, None, None),
    ((252, 507), 40, 100.0, 60, (100, 0, 1, 151)),
    ((37, 16), 16, 1.0, 5, None),
    ((37, 16), 24, 100.0, None, (0, 37)),
    ((1031, 64), 64, 14.3, 200, None),
    ((1031, 64), 32, 100.0, None, (500, 531)),
    ((300, 1280), 512, 1.0, None, (150, 150)),
    ((300, 1280), 1280, 100.0, 30, None),
]


def check(batch, groups, backend, dtype, tolerance, weight=1.0):
    upstream = weight * np.random.default_rng(3).normal(size=(4, len(batch.image)))
    losses, gradients = run(tensors(batch, dtype), upstream, groups, backend)
    expected, gradient = oracle.contrastive(batch, upstream, groups)
    for found, value in zip(losses, expected, strict=False):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(found, value, batch.scale) < tolerance
    for found, value in zip(
        gradients, (gradient.image, gradient.text, gradient.scale), strict=True
    ):
        assert relative_error(found, value, batch.scale) < tolerance


@functools.cache
def case_batch(index):
    (n, width), ref_width, scale, num_labels, groups = CASES[index]
    batch = oracle.clip_like(
        n, width, scale, ref_width=ref_width, num_labels=num_labels, seed=index
    )
    return rounded(batch), groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_oracle(backend, index, dtype):
    batch, groups = case_batch(index)
    tolerance = 1e-10 if dtype == torch.float64 else FP32.get(backend, FP32_DEFAULT)
    check(batch, groups, backend, dtype, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_cones_at_scale_100(backend, monkeypatch):
    batch = rounded(oracle.clip_like(252, 64, 100.0, modality_gap=5.0, num_labels=100))
    batch.ref_scale = 100.0
    assert (batch.image @ batch.text.T).max() < -0.8
    fired = []
    from_peaks = chunked.Shift.from_peaks
    monkeypatch.setattr(
        chunked.Shift, "from_peaks", lambda logits: fired.append(1) or from_peaks(logits)
    )
    # Logits near -95 carry 1e-5 of fp32 rounding, which the weight of a whole direction multiplies
    # by 100: weights of 1 / sqrt(N), between a mean's and a single sample's.
    check(batch, (100, 152), backend, torch.float32, 5e-4, weight=252**-0.5)
    if backend == "chunked":
        assert len(fired) == 4  # both matrices of both groups
    check(batch, (100, 152), backend, torch.float64, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matched_pair_keeps_its_tiny_cross_entropy(backend):
    batch = rounded(oracle.clip_like(100, 512, 100.0))
    batch.text = batch.image.copy()
    losses, _ = run(tensors(batch, torch.float32), np.ones((4, 100)), None, backend)
    expected, _ = oracle.contrastive(batch, np.ones((4, 100)))
    assert expected[0].max() < 1e-20
    torch.testing.assert_close(losses[0].double(), torch.tensor(expected[0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0.01, 30.0])
def test_rows_need_not_be_normalised(backend, length):
    batch = oracle.clip_like(90, 32, 100.0, num_labels=40)
    batch.image *= length * np.linspace(0.5, 1.5, 90)[:, None]
    batch.text *= length
    batch = rounded(batch)
    check(batch, (30, 60), backend, torch.float64, 1e-10)
    # Logits near 1e5 carry 4e-3 of fp32 rounding.
    check(batch, (30, 60), backend, torch.float32, 5e-3 if length > 1 else 4e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weighted_sums_of_the_kl_cannot_overflow(backend):
    """exp(66) in every reference element, logits of 1e11 in the student."""
    batch = oracle.clip_like(40, 16, 100.0)
    batch.image *= 3e4
    batch.text *= 3e4
    batch.ref_image[:] = batch.ref_image[0]
    batch.ref_text[:] = batch.ref_image[0]
    batch = rounded(batch)
    batch.ref_scale = 66.0
    losses, gradients = run(tensors(batch, torch.float32), np.ones((4, 40)), None, backend)
    expected, _ = oracle.contrastive(batch, np.ones((4, 40)))
    for found, value in zip(losses, expected, strict=True):
        assert relative_error(found, value, 1e11) < 1e-3
    assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["image", "text", "ref_image", "ref_text"])
def test_nan_stays_nan_and_in_its_group(backend, where):
    batch = oracle.clip_like(30, 8, 100.0)
    call = tensors(batch, torch.float32)
    with torch.no_grad():
        call[where][4, 2] = torch.nan
    losses = contrastive(**call, groups=(10, 20), backend=backend)
    reached = losses if where in ("image", "text") else losses[2:]
    for loss in reached:
        assert bool(loss[4].isnan())
    if where in ("image", "ref_image"):  # a NaN image is a candidate in every column
        assert all(bool(loss[:10].isnan().all()) for loss in reached[1::2])
    assert all(bool(loss[10:].isfinite().all()) for loss in losses)
    if where in ("image", "text"):
        gradient = torch.autograd.grad(sum(x[:10].sum() for x in losses), call["image"])[0]
        assert bool(gradient[:10].isnan().any())
        assert not gradient[10:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinite_scales_do_not_give_numbers(backend):
    call = tensors(oracle.clip_like(6, 4, 1.0), torch.float32)
    for scale in (torch.nan, torch.inf):
        call["scale"] = torch.tensor(scale)
        assert not any(bool(x.isfinite().any()) for x in contrastive(**call, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_fp32(backend, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    batch = rounded(oracle.clip_like(140, 48, 50.0, ref_width=32), dtype)
    call = tensors(batch, dtype)
    upstream = np.random.default_rng(0).normal(size=(4, 140))
    losses, gradients = run(call, upstream, None, backend)
    expected, gradient = oracle.contrastive(batch, upstream)
    for found, value in zip(losses, expected, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, value, batch.scale) < 4e-4
    assert gradients[0].dtype == gradients[1].dtype == dtype
    assert relative_error(gradients[0].double(), gradient.image, batch.scale) < 2**-8
    assert relative_error(gradients[1].double(), gradient.text, batch.scale) < 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    call = tensors(oracle.clip_like(40, 16, 100.0, num_labels=9), torch.float32)
    upstream = np.ones((4, 40))
    plain = run(call, upstream, None, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive(**call, backend=backend)
        if backend != "dense":  # plain autograd is not to be run under autocast
            gradients = run(call, upstream, None, backend)[1]
            assert all(map(torch.equal, gradients, plain[1]))
    assert all(map(torch.equal, inside, plain[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_groups(backend):
    batch = rounded(oracle.clip_like(4, 3, 30.0))
    for groups in ((0, 1, 0, 3), (1, 1, 1, 1), (2, 2), [4]):
        check(batch, tuple(groups), backend, WIDE, WIDE_ERROR)
    single = contrastive(**tensors(batch, WIDE), groups=(1, 3), backend=backend)
    assert all(x[0].item() == 0 for x in single)
    empty = torch.zeros(0, 3, requires_grad=True)
    for groups in (None, (), (0, 0)):
        losses = contrastive(empty, empty, 1.0, groups=groups, backend=backend)
        assert losses.ce_row.shape == losses.ce_col.shape == (0,)
        assert losses.kl_row is None
        losses.ce_row.sum().backward()


@st.composite
def problems(draw):
    groups = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    total = sum(groups)
    batch = oracle.clip_like(
        max(total, 1),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([0.5, 14.3, 100.0])),
        seed=draw(st.integers(0, 99)),
        ref_width=draw(st.integers(1, 5)),
        modality_gap=draw(st.sampled_from([0.0, 2.0])),
    ).rows(slice(0, total), reference=draw(st.booleans()))
    if draw(st.booleans()):
        batch.labels = np.array([draw(st.integers(-2, 3)) for _ in range(total)], dtype=np.int64)
    return batch, groups


@settings(max_examples=60, deadline=None)
@given(problem=problems(), tile=st.integers(1, 10), backend=st.sampled_from(BACKENDS))
def test_any_shape_groups_and_labels(problem, tile, backend):
    batch, groups = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_TILE_CPU", tile)
        patch.setattr(cpu, "_TILE", tile)
        check(batch, groups, backend, torch.float64, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_output_has_its_own_gradient(backend):
    batch = oracle.clip_like(20, 6, 10.0, num_labels=12)
    call = tensors(batch, torch.float64)
    losses = contrastive(**call, backend=backend)
    for k, sample in itertools.product(range(4), (0, 13)):
        upstream = np.zeros((4, 20))
        upstream[k, sample] = -2.0
        found = torch.autograd.grad(-2.0 * losses[k][sample], call["image"], retain_graph=True)[0]
        expected = oracle.contrastive(batch, upstream)[1].image
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [w for k in (1, 2) for w in itertools.combinations(range(3), k)])
def test_inputs_without_gradient(backend, wanted):
    batch = rounded(oracle.clip_like(20, 6, 10.0, num_labels=12))
    upstream = np.random.default_rng(0).normal(size=(4, 20))
    gradient = oracle.contrastive(batch, upstream)[1]
    call = tensors(batch, WIDE)
    for k, name in enumerate(INPUTS):
        call[name].requires_grad_(k in wanted)
    losses = contrastive(**call, backend=backend)
    sum((torch.tensor(w).to(x) * x).sum() for w, x in zip(upstream, losses, strict=True)).backward()
    for k, name in enumerate(INPUTS):
        if k in wanted:
            assert relative_error(call[name].grad, getattr(gradient, name), 10.0) < WIDE_ERROR
        else:
            assert call[name].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_over_a_retained_graph(backend):
    call = tensors(oracle.clip_like(20, 6, 10.0, num_labels=12), torch.float32)
    total = sum(x.sum() for x in contrastive(**call, backend=backend))
    inputs = [call["image"], call["text"], call["scale"]]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, inputs)))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_computes_the_same_gradients_again(backend, labelled):
    call = tensors(
        rounded(oracle.clip_like(60, 16, 14.3, num_labels=20 if labelled else None)), WIDE
    )
    image = call.pop("image").detach().requires_grad_()

    def losses(rows):
        found = contrastive(rows.sin(), backend=backend, **call)
        weighted = weighted_contrastive(rows.cos(), weights=weights, backend=backend, **call)
        return sum(loss.sum() for loss in found) + weighted.total

    weights = torch.linspace(0.1, 1.0, 240, dtype=WIDE).view(4, 60)
    (expected,) = torch.autograd.grad(losses(image), image)
    again = checkpoint(losses, image, use_reentrant=False)
    (found,) = torch.autograd.grad(again, image)
    assert torch.equal(found, expected)


def test_floats_and_other_dtypes_of_scale():
    batch = oracle.clip_like(9, 4, 8.0)
    call = tensors(batch, torch.float32)
    expected = contrastive(**call)
    for scale in (8.0, 8, torch.tensor(8.0), torch.tensor(8.0, dtype=torch.bfloat16)):
        call["scale"] = scale
        call["ref_scale"] = 20
        assert all(map(torch.equal, contrastive(**call), expected))


def test_mixed_precisions_take_the_wider_one():
    image, text = torch.randn(5, 3), torch.randn(5, 3, dtype=torch.float64)
    assert contrastive(image, text, 2.0).ce_row.dtype == torch.float64
    assert contrastive(image.half(), text.bfloat16(), 2.0).ce_row.dtype == torch.float32


# The stated accuracy of the tiled backends; Triton's is held where its tests run.
@pytest.mark.parametrize(("shape", "scale", "labelled"), criterion_checks.CASES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "dense"])
def test_near_the_oracle_and_no_worse_than_eager(backend, shape, scale, labelled):
    for options in criterion_checks.OPTIONS:
        criterion_checks.check(backend, shape, scale, labelled, **options)


def test_a_gpu_without_its_kernels_is_told_of(monkeypatch):
    # A machine whose Triton is too old would multiply in fp32 without tensor cores, silently.
    monkeypatch.setattr(api, "_explain_missing", lambda backend: f"{backend} is too old")
    api._warn_of_fallback.cache_clear()
    with FakeTensorMode():
        pairs = torch.empty(4, 8, device="cuda"), torch.empty(4, 8, device="cuda")
    with pytest.warns(UserWarning, match=r"triton is too old. Losses, and the precision"):
        assert api.choose_backend("auto", pairs)[0] == "chunked"
    double = tuple(each.double() for each in pairs)
    assert api.choose_backend("auto", double)[0] == "chunked", "no kernel was made for fp64"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [0.0, 5.0])  # 5: under the guard's fallback
def test_gradcheck(backend, gap, monkeypatch):
    monkeypatch.setattr(chunked, "_TILE_CPU", 3)
    monkeypatch.setattr(cpu, "_TILE", 3)
    batch = oracle.clip_like(
        7, 4, 60.0 if gap else 4.0, ref_width=3, num_labels=4, modality_gap=gap
    )
    call = tensors(batch, torch.float64)
    rest = {name: call[name] for name in ("ref_image", "ref_text", "ref_scale", "labels")}

    def losses(image, text, scale):
        return tuple(contrastive(image, text, scale, **rest, groups=(2, 0, 5), backend=backend))

    inputs = (call["image"], call["text"], call["scale"])
    assert torch.autograd.gradcheck(losses, inputs, rtol=1e-5, atol=1e-6)
