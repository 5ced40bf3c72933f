"""Repeated labels: which rows share one, to the bit nothing for those that do not, no host sync."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.ops.contrastive import api, contrastive, weighted_contrastive
from fasterase.ops.contrastive import labels as label_ops
from fasterase.ops.contrastive.labels import find_kinds
from tests import oracle
from tests.ops.calls import assert_same_bits, each_backend


def features(n=12, width=5, dtype=torch.float64):
    torch.manual_seed(0)
    image, text = (torch.randn(n, width, dtype=dtype, requires_grad=True) for _ in range(2))
    return image, text, torch.tensor(7.0, dtype=dtype, requires_grad=True)


def expected(image, text, scale, labels, groups):
    """Row by row, label by label."""
    ends = np.cumsum(groups)
    keys = list(zip(np.searchsorted(ends, np.arange(len(image)), "right"), labels, strict=True))
    rows, cols = [], []
    for i, key in enumerate(keys):
        same = [j for j, other in enumerate(keys) if other == key]
        rows.append(scale * (image[i] @ (text[i] - text[same].mean(0))))
        cols.append(scale * (text[i] @ (image[i] - image[same].mean(0))))
    return torch.stack(rows), torch.stack(cols)


def compute_label_terms(image, text, scale, labels, groups):
    kinds = find_kinds(labels, groups, "cpu")
    return scale * label_ops.multiply_gaps(image, text, kinds, scale.dtype)


def gradients(terms, inputs):
    weights = torch.linspace(-1, 2, 2 * len(terms[0]), dtype=terms[0].dtype).view(2, -1)
    return torch.autograd.grad((torch.stack(tuple(terms)) * weights).sum(), inputs)


@pytest.mark.parametrize(
    "dtype",
    [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)],
)
@each_backend
def test_any_integers(backend, dtype):
    """Only equality counts: neighbours above 2^53, which fp64 merges, stay apart."""
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    values = [least, most, most // 2, most // 2 + 1, most - 1, least + 1, least + 2, most - 2]
    small = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 3, 5]
    large = torch.tensor([values[i] for i in small], dtype=dtype)
    image, text, scale = features(dtype=torch.float32)
    found, expected = (
        contrastive(image, text, scale, labels=labels, groups=(9, 3), backend=backend)[:2]
        for labels in (large, torch.tensor(small))
    )
    assert_same_bits(found, expected)
    assert not torch.equal(found[0], contrastive(image, text, scale, backend=backend).ce_row)
    assert_same_bits(gradients(found, [image]), gradients(expected, [image]))


@pytest.mark.parametrize("piece", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 150, 2**20])
def test_pieces_of_long_runs_and_blocks_of_columns(piece, block, monkeypatch):
    monkeypatch.setattr(label_ops, "_PIECE", piece)
    monkeypatch.setattr(label_ops, "_BLOCK_CPU", block)
    monkeypatch.setattr(label_ops, "_LEAST_COLUMNS", 1)
    labels = torch.tensor([2, 2, 2, 0, 2, 2, 1, 0, 1, 2, 2, 2])
    inputs = features()
    for groups in ((12,), (4, 8), (1, 1, 10)):
        found = compute_label_terms(*inputs, labels, groups)
        wanted = expected(*inputs, labels.tolist(), groups)
        results, exact = ((*terms, *gradients(terms, inputs)) for terms in (found, wanted))
        torch.testing.assert_close(results, exact, rtol=1e-10, atol=1e-12)


def test_a_label_that_occurs_once_adds_exactly_nothing():
    inputs = features(dtype=torch.float32)
    with torch.no_grad():
        inputs[0][3] = torch.nan
        inputs[1][7] = torch.inf
    for groups, labels in (((12,), torch.arange(12)), ((6, 6), torch.arange(12) % 6)):
        assert find_kinds(labels, groups, "cpu") is None
        kinds = label_ops._find_kinds(labels, groups)
        terms = label_ops.multiply_gaps(*inputs[:2], kinds, torch.float32)
        assert not terms.any()
        assert not any(bool(x.any()) for x in gradients(terms, inputs[:2]))


@pytest.mark.parametrize("function", [contrastive, weighted_contrastive])
def test_labels_on_the_host_that_are_distinct_in_their_groups_cost_nothing(function, monkeypatch):
    """Nor is anything read back of those that are elsewhere."""
    found = []

    def spy(*arguments):
        found.append(find_kinds(*arguments))
        return found[-1]

    monkeypatch.setattr(api, "find_kinds", spy)
    inputs = features(dtype=torch.float32)
    call = dict(zip(("image", "text", "scale"), inputs, strict=True)) | {"backend": "chunked"}
    if function is weighted_contrastive:
        call["weights"] = torch.ones(2, 12)
    labels = torch.arange(12) % 6
    function(**call, labels=labels, groups=(6, 6))
    function(**call, labels=torch.arange(12).to(torch.uint64))
    function(**call, labels=labels, groups=(7, 5))
    function(**call, labels=labels)
    assert [kinds is None for kinds in found] == [True, True, False, False]
    with FakeTensorMode():
        assert find_kinds(torch.arange(12), (12,), "cpu") is not None
    assert find_kinds(torch.arange(12, device="meta"), (12,), "meta") is not None


def test_nan_reaches_its_own_label_alone():
    inputs = features()
    with torch.no_grad():
        inputs[0][3] = torch.nan
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 4, 5, 6, 0])
    row, col = compute_label_terms(*inputs, labels, (10, 2))
    touched = torch.zeros(12, dtype=torch.bool)
    touched[[0, 3, 7]] = True  # row 11 has the label in another group
    assert torch.equal(row.isnan(), touched & (torch.arange(12) == 3))
    assert torch.equal(col.isnan(), touched)
    d_image, d_text = gradients((row, col), inputs[:2])
    assert not d_image.isnan().any()  # which is linear in text
    assert torch.equal(d_text.isnan().any(1), touched)


def test_one_caption_for_all_keeps_its_precision():
    """A running fp32 sum of 20000 equal rows is off by 2e-4 of it."""
    image, text, scale = features(20000, 4, torch.float32)
    text = torch.nn.functional.normalize(text[:1].detach()).expand(20000, 4)
    call = (image, text, scale, torch.zeros(20000, dtype=torch.long), (20000,))
    assert compute_label_terms(*call)[0].abs().max() < 2e-5 * scale * image.norm(dim=1).max()


@pytest.mark.parametrize("num_labels", [1, 7])
@each_backend
def test_many_positives_keep_the_precision_of_the_sums(backend, num_labels):
    """Over several tiles, whose positives are a whole tile, or scattered."""
    image, text, _ = (x.detach() for x in features(1300, 4))
    labels = torch.arange(1300) % num_labels
    image, text = (torch.nn.functional.normalize(x) for x in (image, text[:num_labels][labels]))
    exact = contrastive(image, text, 100.0, labels=labels, groups=(1100, 200), backend="dense")
    rounded = image.float(), text.float()
    found = contrastive(*rounded, 100.0, labels=labels, groups=(1100, 200), backend=backend)
    for loss, value in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-4)


class Refused(TorchDispatchMode):
    """Refuses what reads a value back to the host or has a size that depends on values."""

    forbidden = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(word in name for word in self.forbidden), name
        is_bool = [x for x in args[1:2] if isinstance(x, (list, tuple)) for x in x if x is not None]
        assert "index" not in name or all(
            getattr(x, "dtype", torch.long) != torch.bool for x in is_bool
        ), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_back():
    inputs, labels = features(dtype=torch.float32), torch.arange(12) // 2
    with Refused():
        terms = compute_label_terms(*inputs, labels, (5, 7))
        gradients(terms, inputs)
        kinds = label_ops._find_kinds(labels, (5, 7))
        terms = label_ops._forward(*(x.detach() for x in inputs[:2]), kinds, torch.float32)
        label_ops._backward(terms, *(x.detach() for x in inputs[:2]), kinds, True, True)
    with Refused(), pytest.raises(AssertionError, match="unique"):
        torch.unique(labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype):
    image, text, _ = features(dtype=dtype)
    labels = torch.arange(12) // 2
    kinds = label_ops._find_kinds(labels, (5, 7))
    torch.library.opcheck(torch.ops.fasterase.label_kinds.default, (labels, (5, 7)))
    call = (image, text, kinds, torch.float32)
    torch.library.opcheck(torch.ops.fasterase.label_terms.default, call)
    upstream = torch.randn(2, 12)
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.fasterase.label_terms_backward.default,
            (upstream, image.detach(), text.detach(), kinds, *wants),
        )


def test_the_definition_stays_differentiable_twice():
    batch = oracle.clip_like(6, 3, 4.0)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    inputs = [torch.tensor(x, requires_grad=True) for x in (batch.image, batch.text)]

    def losses(image, text):
        return contrastive(image, text, 4.0, labels=labels, backend="dense")[:2]

    assert torch.autograd.gradgradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(lambda image: losses(image, inputs[1].detach()), inputs[0])


@each_backend
def test_labels_that_change_between_the_passes_change_no_gradient(backend):
    """They are kept, or their change is an error."""
    image, text, scale, *_ = features()

    def gradient(*, is_changed: bool):
        labels = torch.arange(12) // 2
        loss = contrastive(image, text, scale, labels=labels, backend=backend).ce_row.sum()
        if is_changed:
            labels.add_(torch.arange(12))
        return torch.autograd.grad(loss, image)[0]

    expected = gradient(is_changed=False)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(is_changed=True)
    else:
        assert torch.equal(gradient(is_changed=True), expected)


def test_the_same_bits_with_any_number_of_threads():
    inputs, labels = features(3000, 70, torch.float32), torch.arange(3000) % 7
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            terms = compute_label_terms(*inputs, labels, (1000, 2000))
            found.append((*terms, *gradients(terms, inputs[:2])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(found[0], other)
