"""`erase_loss` against the fp64 oracle, every option, and what it refuses."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from fasterase import objective
from fasterase.errors import InputError
from fasterase.objective import Objective, erase_loss, weighted_erase_loss
from fasterase.ops.contrastive import available_backends
from tests import oracle
from tests.ops.calls import rounded, tensors

# On CPU tensors; test_contrastive_triton*.py have the GPU's backend.
BACKENDS = tuple(name for name in available_backends() if name != "triton")
TERMS = ("forget", "retain", "consistency", "anchor")

# (N, D), D0, scale, repeated labels, then the options.
CASES = [
    ((252, 507), 507, 14.3, 60, {"n_forget": 64}),
    ((252, 507), 40, 100.0, None, {"n_forget": 1, "negatives": "joint"}),
    ((252, 507), 507, 100.0, 60, {"n_forget": 0, "anchor_weight": 10.0}),
    ((37, 16), 16, 1.0, 9, {"n_forget": 37, "anchor_weight": 10.0}),
    ((37, 16), 16, 14.3, None, {"n_forget": 37, "forget_loss": "contrastive"}),
    ((37, 16), 16, 100.0, 9, {"n_forget": 12, "floor": 0.75, "anchor_weight": 10.0}),
    ((37, 16), 8, 14.3, 9, {"n_forget": 36, "forget_loss": "contrastive"}),
    (
        (1031, 64),
        64,
        100.0,
        200,
        {"n_forget": 31, "forget_loss": "contrastive", "negatives": "joint", "anchor_weight": 0.5},
    ),
    ((300, 1280), 512, 14.3, None, {"n_forget": 100, "consistency_weight": 0.0}),
    ((300, 1280), 512, 1.0, 40, {"n_forget": 100, "forget_weight": 0.0, "retain_weight": 0.5}),
    ((60, 16), 16, 14.3, 20, {"n_forget": 20, "retain_weight": 0.0, "negatives": "joint"}),
    # The mean cosine is above the floor, below it, and without one.
    ((60, 16), 16, 14.3, 20, {"n_forget": 20, "floor": 0.1, "cross_weight": 0.7}),
    (
        *((60, 16), 16, 14.3, 20),
        {"n_forget": 20, "floor": 0.7, "cross_weight": 0.7, "floor_margin": 0.1},
    ),
    ((60, 16), 16, 14.3, 20, {"n_forget": 20, "floor": 0.85, "cross_weight": 0.7}),
    ((60, 16), 16, 14.3, 20, {"n_forget": 20, "cross_weight": 1.0}),
]


def weighted(*arguments, n_forget, labels=None, **rest):
    """`weighted_erase_loss`, called like `erase_loss`."""
    batch = {key: rest.pop(key) for key in list(rest) if key not in Objective._fields}
    options = {"objective": Objective(**rest), "n_forget": n_forget, "labels": labels}
    return weighted_erase_loss(*arguments, **batch, **options)


EITHER = pytest.mark.parametrize("loss_of", [erase_loss, weighted])


@functools.cache
def expectation(index):
    (n, width), ref_width, scale, num_labels, options = CASES[index]
    batch = rounded(
        oracle.clip_like(n, width, scale, ref_width=ref_width, num_labels=num_labels, seed=index)
    )
    return batch, *oracle.erase_loss(batch, **options)


def assert_near(found, expected, tolerance, scale):
    """Element by element, small ones against a floor, and where there are many also as a whole."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = found.detach().double() - expected
    bound = tolerance * expected.abs().clamp_min(1e-2 * max(1.0, scale / 10))
    assert bool((error.abs() <= bound).all()), (error.abs() / bound).max()
    if error.dim():
        assert error.norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_oracle(backend, index, dtype):
    batch, values, gradient = expectation(index)
    call, options = tensors(batch, dtype), CASES[index][-1]
    loss = erase_loss(**call, **options, backend=backend)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for name in ("total", *TERMS):
        term = getattr(loss, name)
        assert term.shape == ()
        assert term.dtype == dtype
        weight = 1.0 if name == "total" else options.get(f"{name}_weight", 1.0)
        if weight:  # a term without weight may be reported or not, as its matrix is used or not
            assert_near(term, values[name], tolerance, batch.scale)
    gradients = torch.autograd.grad(loss.total, [call["image"], call["text"], call["scale"]])
    for found, value in zip(
        gradients, (gradient.image, gradient.text, gradient.scale), strict=True
    ):
        assert_near(found, value, tolerance, batch.scale)


def test_terms_are_differentiable_one_by_one():
    batch = oracle.clip_like(30, 8, 10.0, num_labels=12)
    call = tensors(batch, torch.float64)
    loss = erase_loss(**call, n_forget=10, anchor_weight=1.0)
    weights = dict.fromkeys((f"{name}_weight" for name in TERMS), 0.0)
    for name in TERMS:
        found = torch.autograd.grad(getattr(loss, name), call["image"], retain_graph=True)[0]
        only = weights | {f"{name}_weight": 1.0}
        expected = oracle.erase_loss(batch, n_forget=10, **only)[1].image
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_made_in_the_forward_are_the_same(backend, index):
    batch, options = expectation(index)[0], CASES[index][-1]
    call = tensors(batch)
    inputs = [call["image"], call["text"], call["scale"]]
    plain, ahead = (
        loss_of(**call, **options, backend=backend) for loss_of in (erase_loss, weighted)
    )
    torch.testing.assert_close(torch.stack(ahead), torch.stack(plain), rtol=1e-5, atol=1e-6)
    assert not any(getattr(ahead, name).requires_grad for name in TERMS)
    expected = torch.autograd.grad(7.0 * plain.total, inputs)
    for one, other in zip(torch.autograd.grad(7.0 * ahead.total, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())


def test_an_infinite_total_stays_so_with_gradients_made_in_the_forward():
    call = {"image": torch.eye(4), "text": torch.eye(4).flip(0), "scale": torch.tensor(3e38)}
    rest = {"ref_image": None, "ref_text": None, "ref_scale": None, "consistency_weight": 0.0}
    for loss_of in (erase_loss, weighted):
        assert loss_of(**call, **rest, n_forget=1, retain_weight=4.0).total == torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("negatives", ["own", "joint"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_made_in_the_forward_compile_as_one_graph(backend, negatives):
    def total(image, text, scale, ref_image, ref_text):
        options = {"forget_loss": "contrastive", "negatives": negatives, "anchor_weight": 1.0}
        options |= {"backend": backend, "n_forget": 7}
        return weighted(image, text, scale, ref_image, ref_text, 20.0, **options).total

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    names = ("image", "text", "scale", "ref_image", "ref_text")
    for n in (24, 30):
        call = tensors(oracle.clip_like(n, 6, 10.0))
        arguments = [call[name] for name in names]
        found, expected = compiled(*arguments), total(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        pair = [torch.autograd.grad(x, arguments[:3]) for x in (found, expected)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("negatives", ["own", "joint"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "dense"])
def test_only_gradients_live_between_the_passes(backend, negatives):
    call = tensors(oracle.clip_like(60, 16, 10.0))
    options = {"n_forget": 20, "forget_loss": "contrastive", "negatives": negatives}
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        weighted(**call, **options, backend=backend)
    assert sum(x.numel() for x in packed) <= 2 * 60 * 16 + 20  # a few numbers beside


@pytest.fixture(params=["contrastive", "weighted_contrastive"])
def matrices(monkeypatch, request):
    """(rows, has KL, groups) of each call of the operator, and the loss that makes them."""
    calls = []

    def spy(**options):
        calls.append((len(options["image"]), "ref_image" in options, options["groups"]))
        return called(**options)

    called = getattr(objective, request.param)
    monkeypatch.setattr(objective, request.param, spy)
    return calls, weighted if request.param == "weighted_contrastive" else erase_loss


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(20, True, None)]),
        ({"consistency_weight": 0}, [(20, False, None)]),
        ({"retain_weight": 0}, [(20, True, None)]),
        ({"retain_weight": 0, "consistency_weight": 0}, []),
        ({"forget_loss": "contrastive"}, [(30, True, (10, 20))]),
        ({"forget_loss": "contrastive", "forget_weight": 0}, [(20, True, None)]),
        ({"negatives": "joint"}, [(30, True, None)]),
        ({"negatives": "joint", "retain_weight": 0, "consistency_weight": 0}, []),
        ({"negatives": "joint", "forget_loss": "contrastive"}, [(30, True, None)]),
        ({"forget_loss": "contrastive", "consistency_weight": 0}, [(30, False, (10, 20))]),
        (
            {"forget_loss": "contrastive", "retain_weight": 0, "consistency_weight": 0},
            [(10, False, None)],
        ),
    ],
)
def test_matrices_that_no_weight_uses_are_not_computed(matrices, options, expected):
    calls, loss_of = matrices
    loss = loss_of(**tensors(oracle.clip_like(30, 8, 10.0)), n_forget=10, **options)
    assert calls == expected
    if not expected:
        assert loss.retain == loss.consistency == 0
    if "forget_loss" in options and not options.get("forget_weight", 1):
        assert loss.forget == 0
    assert loss.anchor == 0


@pytest.mark.parametrize("n_forget", [0, 6])
@pytest.mark.parametrize("weights", [0.0, 1.0])
@EITHER
def test_every_input_gets_a_gradient_also_where_it_is_zero(n_forget, weights, loss_of):
    call = tensors(oracle.clip_like(6, 4, 10.0))
    options = dict.fromkeys((f"{name}_weight" for name in TERMS), weights)
    loss = loss_of(**call, n_forget=n_forget, **options)
    inputs = [call["image"], call["text"], call["scale"]]
    gradients = torch.autograd.grad(loss.total, inputs)
    assert all(bool(x.isfinite().all()) for x in gradients)
    if n_forget == 6:
        assert loss.retain == loss.consistency == loss.anchor == gradients[2] == 0


@EITHER
def test_an_empty_batch_is_worth_nothing(loss_of):
    empty = torch.zeros(0, 4, requires_grad=True)
    options = {"n_forget": 0, "consistency_weight": 0}
    loss = loss_of(empty, empty, 10.0, None, None, None, **options)
    assert torch.stack(loss).tolist() == [0.0] * 5
    loss.total.backward()


@pytest.mark.parametrize("name", ["image", "text", "ref_image", "scale"])
@EITHER
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_nan_out(name, loss_of, backend):
    call = tensors(oracle.clip_like(12, 4, 100.0))
    with torch.no_grad():
        call[name].view(-1)[-1] = torch.nan
    loss = loss_of(**call, n_forget=4, backend=backend)
    assert bool(loss.total.isnan())


def test_half_precision_and_autocast():
    batch = oracle.clip_like(20, 8, 50.0, num_labels=9)
    call = tensors(batch)
    for name in ("image", "text", "ref_image", "ref_text"):
        call[name] = call[name].detach().bfloat16()
    call["image"].requires_grad_()
    plain = erase_loss(**call, n_forget=5, anchor_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = erase_loss(**call, n_forget=5, anchor_weight=1.0)
    assert inside == plain
    assert plain.total.dtype == torch.float32
    assert torch.autograd.grad(plain.total, call["image"])[0].dtype == torch.bfloat16


def test_the_originals_features_may_be_absent_where_unused():
    call = tensors(oracle.clip_like(12, 4, 10.0))
    full = erase_loss(**call, n_forget=4, consistency_weight=0)
    call |= dict.fromkeys(("ref_image", "ref_text", "ref_scale"))
    assert erase_loss(**call, n_forget=4, consistency_weight=0) == full


WRONG = [
    ({"text": None}, "text must be a torch.Tensor"),
    ({"scale": torch.ones(2)}, "scale must be a 0-d"),
    ({"scale": 0}, "scale must be a positive number"),
    ({"n_forget": 7}, "n_forget must be an integer between 0 and the 6 rows.*got 7"),
    ({"n_forget": -1}, "n_forget must be an integer between 0"),
    ({"n_forget": 2.0}, "n_forget must be an integer.*2.0"),
    ({"n_forget": True}, "n_forget must be an integer"),
    ({"forget_weight": "3"}, "forget_weight must be a number of at least 0; got '3'"),
    ({"retain_weight": -1.0}, "retain_weight must be .*-1.0"),
    ({"consistency_weight": None}, "consistency_weight must be .*None"),
    ({"anchor_weight": float("inf")}, "anchor_weight must be .*inf"),
    ({"forget_loss": "cosine"}, "forget_loss must be one of 'similarity', 'contrastive'; got"),
    ({"negatives": "all"}, "negatives must be one of 'own', 'joint'; got 'all'"),
    ({"floor": "auto"}, "floor must be None or a number.*unlearn"),
    ({"floor": float("nan")}, "floor must be None or a number"),
    ({"floor_margin": -0.1}, "floor_margin must be a number of at least 0"),
    ({"floor": 0.1, "forget_loss": "contrastive"}, "floor is a cosine and goes with"),
    ({"backend": "cuda", "retain_weight": 0, "consistency_weight": 0}, "backend must be one of"),
    ({"labels": torch.zeros(6)}, "labels must be integers"),
    ({"labels": torch.zeros(4).long()}, "labels must be a tensor of 6 integers"),
    ({"ref_image": None}, "ref_image missing, but consistency_weight=3.0.*or consistency_weight=0"),
    ({"ref_scale": None}, "ref_scale missing, but consistency_weight=3.0"),
    (
        {"ref_image": None, "ref_text": None, "anchor_weight": 1, "consistency_weight": 0},
        "ref_image and ref_text missing, but anchor_weight=1",
    ),
    (
        {"ref_image": None, "ref_text": None, "cross_weight": 1, "consistency_weight": 0},
        "ref_image and ref_text missing, but cross_weight=1",
    ),
    ({"ref_text": None, "consistency_weight": 0}, "ref_image and ref_text go together"),
    ({"ref_image": torch.zeros(6, 4, requires_grad=True)}, "ref_image requires grad"),
    (
        {"ref_image": torch.zeros(5, 4), "consistency_weight": 0, "anchor_weight": 1.0},
        "ref_image and ref_text must have the same shape",
    ),
    ({"ref_scale": "x"}, "ref_scale must be"),
    (
        {"ref_image": torch.zeros(6, 3), "ref_text": torch.zeros(6, 3), "anchor_weight": 1.0},
        "anchor_weight=1.0 needs original features as wide.*got 3 and 4",
    ),
    (
        {"ref_image": torch.zeros(6, 3), "ref_text": torch.zeros(6, 3), "cross_weight": 1.0},
        "cross_weight=1.0 needs original features as wide.*got 3 and 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(changes, message):
    call = tensors(oracle.clip_like(6, 4, 10.0)) | {"n_forget": 2} | changes
    with pytest.raises(InputError, match=message):
        erase_loss(**call)
