"""`contrastive` on every backend: values and gradients, against the fp64 oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fasterase.ops.contrastive import chunked, contrastive, cpu, weighted_contrastive
from tests import oracle
from tests.ops.calls import (
    BACKENDS,
    INPUTS,
    IS_INTERPRETED,
    WIDE,
    assert_same_bits,
    check,
    each_backend,
    each_tiled_backend,
    leaves,
    make,
    relative_error,
    run,
    tensors,
)

not_interpreted = pytest.mark.skipif(IS_INTERPRETED, reason="needs fp64, or takes too long")

# (N, D), D0, scale, labels, groups. Multiples of no tile, of some, of all; widths below, at and
# above a tile's depth; groups of very different sizes, none and one pair among them.
SMALL = [
    ((123, 80), 48, 14.3, None, None),
    ((123, 80), 48, 100.0, 60, (0, 123)),
    ((67, 33), 33, 100.0, 20, (3, 64)),
    ((67, 33), 33, 14.3, None, None),
    ((130, 64), 96, 100.0, None, (130, 0)),
    ((130, 64), 96, 14.3, 90, (1, 2, 127)),
    ((65, 128), 128, 14.3, None, (64, 1)),
    ((65, 128), 128, 100.0, None, None),
    ((6, 1), 1, 30.0, None, (2, 1, 0, 3)),
    ((37, 16), 16, 1.0, 5, None),
    ((37, 16), 24, 100.0, None, (0, 37)),
]
# 1031: three tiles, the last ragged; 1280: wider than long.
LARGE = [
    ((252, 507), 507, 14.3, None, None),
    ((252, 507), 40, 100.0, 60, (100, 0, 1, 151)),
    ((1031, 64), 64, 14.3, 200, None),
    ((1031, 64), 32, 100.0, None, (500, 531)),
    ((300, 1280), 512, 1.0, None, (150, 150)),
    ((300, 1280), 1280, 100.0, 30, None),
]
FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
if IS_INTERPRETED:  # in turn
    CASES = [(case, (FP32, FP16)[number % 2]) for number, case in enumerate(SMALL)]
else:
    CASES = [*itertools.product(SMALL, (FP32, FP64, FP16, BF16))]
    CASES += itertools.product(LARGE, (FP32, FP64))


@pytest.fixture(autouse=True)
def _no_amx(monkeypatch):
    """bf16 features are computed in fp32, as on most CPUs; test_contrastive_cpu.py has the rest."""
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)


@pytest.mark.parametrize(("case", "dtype"), CASES)
@each_backend
def test_matches_the_oracle(backend, case, dtype):
    (n, width), ref_width, scale, labels, groups = case
    call, batch = make(n, width, scale, dtype=dtype, ref_width=ref_width, labels=labels, seed=n)
    # Tiles of torch add what labels bring to gradients that are rounded already.
    rounded_once = not IS_INTERPRETED and (backend != "chunked" or labels is None)
    check(backend, call, batch, groups, rounded_once=rounded_once)


@not_interpreted
@pytest.mark.parametrize("dtype", [FP32, FP64])
@each_backend
def test_opposite_cones_at_scale_100(backend, dtype, monkeypatch):
    call, batch = make(252, 64, 100.0, dtype=dtype, labels=100, cones=True)
    assert (batch.image @ batch.text.T).max() < -0.8
    fired = []
    from_peaks = chunked.Shift.from_peaks
    monkeypatch.setattr(
        chunked.Shift, "from_peaks", lambda logits: fired.append(1) or from_peaks(logits)
    )
    check(backend, call, batch, (100, 152), cones=True)
    if backend == "chunked" and dtype == FP32:
        assert len(fired) == 4  # both matrices of both groups


@each_backend
def test_a_matched_pair_keeps_its_tiny_cross_entropy(backend):
    _, batch = make(100, 512, 100.0)
    batch.text = batch.image.copy()
    losses, _ = run(tensors(batch), np.ones((4, 100)), None, backend)
    expected, _ = oracle.contrastive(batch, np.ones((4, 100)))
    assert expected[0].max() < 1e-20
    torch.testing.assert_close(losses[0].double(), torch.tensor(expected[0]), rtol=1e-4, atol=0)


@not_interpreted
@each_backend
@pytest.mark.parametrize("length", [0.01, 30.0])
def test_rows_need_not_be_normalised(backend, length):
    _, batch = make(90, 32, 100.0, labels=40)
    batch.image *= length * np.linspace(0.5, 1.5, 90)[:, None]
    batch.text *= length
    check(backend, tensors(batch, FP64), batch, (30, 60))
    # Logits near 1e5 carry 4e-3 of fp32 rounding.
    for name in ("image", "text"):
        setattr(batch, name, getattr(batch, name).astype(np.float32).astype(np.float64))
    check(backend, tensors(batch), batch, (30, 60), tolerance=5e-3 if length > 1 else 4e-4)


@not_interpreted
@each_backend
def test_the_weighted_sums_of_the_kl_cannot_overflow(backend):
    """exp(66) in every reference element, logits of 1e11 in the student."""
    _, batch = make(40, 16, 100.0)
    for name in ("image", "text"):
        setattr(batch, name, (3e4 * getattr(batch, name)).astype(np.float32).astype(np.float64))
    batch.ref_image[:] = batch.ref_text[:] = batch.ref_image[0]
    batch.ref_scale = 66.0
    losses, gradients = run(tensors(batch), np.ones((4, 40)), None, backend)
    expected, _ = oracle.contrastive(batch, np.ones((4, 40)))
    for found, value in zip(losses, expected, strict=True):
        assert relative_error(found, value, 1e11) < 1e-3
    assert all(bool(x.isfinite().all()) for x in gradients)


@each_backend
@pytest.mark.parametrize("where", ["image", "text", "ref_image", "ref_text"])
def test_nan_stays_nan_and_in_its_group(backend, where):
    call, _ = make(30, 8, 100.0)
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


@each_backend
def test_nan_and_infinite_scales_do_not_give_numbers(backend):
    call, _ = make(6, 4, 1.0)
    for scale in (torch.nan, torch.inf):
        call["scale"] = torch.tensor(scale)
        assert not any(bool(x.isfinite().any()) for x in contrastive(**call, backend=backend))


@each_backend
def test_autocast_changes_nothing(backend):
    call, _ = make(40, 16, 100.0, labels=9)
    upstream = np.ones((4, 40))
    plain = run(call, upstream, None, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive(**call, backend=backend)
        if backend != "dense":  # plain autograd is not to be run under autocast
            assert_same_bits(run(call, upstream, None, backend)[1], plain[1])
    assert_same_bits(inside, plain[0])


@each_backend
def test_small_groups(backend):
    call, batch = make(4, 3, 30.0, dtype=WIDE)
    for groups in ((0, 1, 0, 3), (1, 1, 1, 1), (2, 2), [4]):
        check(backend, call, batch, tuple(groups))
    single = contrastive(**call, groups=(1, 3), backend=backend)
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


@not_interpreted
@settings(max_examples=60, deadline=None)
@given(problem=problems(), tile=st.integers(1, 10), backend=st.sampled_from(BACKENDS))
def test_any_shape_groups_and_labels(problem, tile, backend):
    batch, groups = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_TILE_CPU", tile)
        patch.setattr(cpu, "_TILE", tile)
        check(backend, tensors(batch, FP64), batch, groups, tolerance=1e-9)


@not_interpreted
@each_backend
def test_each_output_has_its_own_gradient(backend):
    call, batch = make(20, 6, 10.0, labels=12, dtype=FP64)
    losses = contrastive(**call, backend=backend)
    for k, sample in itertools.product(range(4), (0, 13)):
        upstream = np.zeros((4, 20))
        upstream[k, sample] = -2.0
        found = torch.autograd.grad(-2.0 * losses[k][sample], call["image"], retain_graph=True)[0]
        expected = oracle.contrastive(batch, upstream)[1].image
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


@each_backend
@pytest.mark.parametrize("wanted", [w for k in (1, 2) for w in itertools.combinations(INPUTS, k)])
def test_inputs_without_gradient(backend, wanted):
    call, batch = make(20, 6, 10.0, labels=12, dtype=WIDE)
    for name in INPUTS:
        call[name].requires_grad_(name in wanted)
    upstream = np.random.default_rng(0).normal(size=(4, 20))
    exact = oracle.contrastive(batch, upstream)[1]
    _, gradients = run(call, upstream, None, backend)
    for name, found in zip(wanted, gradients, strict=True):
        assert relative_error(found, getattr(exact, name), 10.0) < (1e-10 if WIDE == FP64 else 3e-4)


@each_backend
def test_second_backward_over_a_retained_graph(backend):
    call, _ = make(20, 6, 10.0, labels=12)
    total = sum(x.sum() for x in contrastive(**call, backend=backend))
    first = torch.autograd.grad(total, leaves(call), retain_graph=True)
    assert_same_bits(first, torch.autograd.grad(total, leaves(call)))


@not_interpreted
@pytest.mark.parametrize("labels", [None, 20])
@each_backend
def test_a_checkpoint_computes_the_same_gradients_again(backend, labels):
    call, _ = make(60, 16, 14.3, labels=labels, dtype=FP64)
    image = call.pop("image").detach().requires_grad_()
    weights = torch.linspace(0.1, 1.0, 240, dtype=FP64).view(4, 60)

    def losses(rows):
        found = contrastive(rows.sin(), backend=backend, **call)
        weighted = weighted_contrastive(rows.cos(), weights=weights, backend=backend, **call)
        return sum(loss.sum() for loss in found) + weighted.total

    (expected,) = torch.autograd.grad(losses(image), image)
    again = checkpoint(losses, image, use_reentrant=False)
    (found,) = torch.autograd.grad(again, image)
    assert torch.equal(found, expected)


@not_interpreted
@each_backend
@pytest.mark.parametrize("cones", [False, True])  # True: under the guard's fallback
def test_gradcheck(backend, cones, monkeypatch):
    monkeypatch.setattr(chunked, "_TILE_CPU", 3)
    monkeypatch.setattr(cpu, "_TILE", 3)
    call, _ = make(7, 4, 60.0 if cones else 4.0, ref_width=3, labels=4, cones=cones, dtype=FP64)
    call["ref_scale"].fill_(20.0)
    rest = {name: call[name] for name in ("ref_image", "ref_text", "ref_scale", "labels")}

    def losses(image, text, scale):
        return tuple(contrastive(image, text, scale, **rest, groups=(2, 0, 5), backend=backend))

    assert torch.autograd.gradcheck(losses, leaves(call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [None, 50])
@each_tiled_backend
def test_the_same_bits_twice(backend, labels):
    n = 70 if IS_INTERPRETED else 600
    call, _ = make(n, 32, 100.0, labels=labels, dtype=FP16 if IS_INTERPRETED else FP32)
    first, second = (run(call, np.ones((4, n)), (30, n - 30), backend) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)


@pytest.mark.parametrize("of", ["product", "sum", "weighted sum"])
@each_tiled_backend
def test_a_second_derivative_is_refused(backend, of):
    """A sum's upstream gradient requires no grad; the terms of labels are refused with the rest."""
    call, _ = make(reference=False, labels=20)
    image = call["image"]
    if of == "weighted sum":
        weights = torch.ones(2, len(image))
        total = weighted_contrastive(**call, weights=weights, backend=backend).total
    else:
        factor = image[:, 0] if of == "product" else 1.0
        total = (contrastive(**call, backend=backend).ce_row * factor).sum()
    gradient = torch.autograd.grad(total, image, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@each_tiled_backend
def test_an_upstream_gradient_that_is_not_finite_spoils_its_group_alone(backend, bad):
    call, _ = make(reference=False)
    losses = contrastive(**call, groups=(15, 25), backend=backend)
    upstream = torch.ones(40)
    upstream[0] = bad
    gradient = torch.autograd.grad(losses.ce_row, call["image"], upstream)[0]
    assert gradient[15:].isfinite().all()
    assert not gradient[0].isfinite().all()


@each_tiled_backend
def test_a_reference_of_a_wider_dtype_is_computed_in_that_of_the_features(backend):
    call, _ = make()
    expected = contrastive(**call, backend=backend)
    wide = {name: call[name].double() for name in ("ref_image", "ref_text")}
    assert_same_bits(contrastive(**call | wide, backend=backend), expected)


@pytest.mark.parametrize("backend", sorted({"cpu", "triton"} & set(BACKENDS)))
def test_rows_may_lie_apart(backend):
    """In columns of a wider matrix, or stored by columns."""
    call, _ = make(50, 8)
    upstream = np.ones((4, 50))
    expected = run(call, upstream, None, backend)
    inside = torch.zeros(50, 20)
    inside[:, 4:12] = call["image"].detach()
    call["image"] = inside[:, 4:12].requires_grad_()
    call["text"] = call["text"].detach().T.contiguous().T.requires_grad_()
    for found, value in zip(run(call, upstream, None, backend), expected, strict=True):
        assert_same_bits(found, value)


def test_floats_and_other_dtypes_of_scale():
    call, _ = make(9, 4, 8.0)
    expected = contrastive(**call)
    for scale in (8.0, 8, torch.tensor(8.0), torch.tensor(8.0, dtype=torch.bfloat16)):
        assert_same_bits(contrastive(**call | {"scale": scale, "ref_scale": 20}), expected)


@not_interpreted
def test_mixed_precisions_take_the_wider_one():
    image, text = torch.randn(5, 3), torch.randn(5, 3, dtype=torch.float64)
    assert contrastive(image, text, 2.0).ce_row.dtype == torch.float64
    assert contrastive(image.half(), text.bfloat16(), 2.0).ce_row.dtype == torch.float32
