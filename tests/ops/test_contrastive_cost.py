"""What a tiled backend costs: products it skips, memory it does not take, the same bits twice."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.ops.contrastive import available_backends, contrastive, weighted_contrastive
from tests.ops.calls import INPUTS, features

TILED = [name for name in available_backends() if name not in ("dense", "triton")]
N, D = 600, 32
PRODUCTS = (torch.ops.aten.matmul, torch.ops.aten.mm, torch.ops.aten.addmm_)


class MultiplyAdds(TorchDispatchMode):
    """Counts those of matrix products in torch, in place or not, also inside our operators."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasterase":
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def batch(**grads):
    image, text, scale, *reference = features(N, D)
    for name, each in zip(INPUTS, (image, text, scale), strict=True):
        each.requires_grad_(grads.get(name, True))
    return (
        image,
        text,
        scale,
        dict(zip(("ref_image", "ref_text", "ref_scale"), reference, strict=True)),
    )


def products(function):
    """How many N x N x D products `function` computes."""
    with MultiplyAdds() as counter:
        function()
    return counter.total / (N * N * D)


def test_forward_and_backward_products():
    image, text, scale, reference = batch()
    losses = []
    call = functools.partial(contrastive, image, text, scale, backend="chunked")
    assert products(lambda: losses.extend(call(**reference))) == 2
    assert products(lambda: sum(x.sum() for x in losses).backward()) == 4
    assert products(lambda: losses.extend(call()[:2])) == 1
    assert products(lambda: sum(x.sum() for x in losses[4:]).backward()) == 3


@pytest.mark.parametrize(
    ("grads", "expected"),
    [
        ({"text": False}, 2),
        ({"image": False}, 2),
        ({"image": False, "text": False}, 2),
        ({"scale": False}, 3),
    ],
)
def test_inputs_without_gradient_cost_nothing(grads, expected):
    image, text, scale, _ = batch(**grads)
    losses = contrastive(image, text, scale, backend="chunked")
    assert products(lambda: (losses.ce_row.sum() + losses.ce_col.sum()).backward()) == expected


def test_losses_without_upstream_gradient_cost_nothing():
    image, text, scale, reference = batch()
    halves = (N // 2, N // 2)
    losses = contrastive(image, text, scale, **reference, groups=halves, backend="chunked")
    group = N * N / 4 / N / N  # the products of one group
    first, zeros = slice(0, N // 2), torch.zeros(N)

    def backward(total):
        return products(lambda: total.backward(retain_graph=True))

    assert backward(losses.ce_row.sum()) == 3 * 2 * group  # no product of the reference
    assert backward(losses.ce_row[first].sum()) == 3 * group
    assert backward(losses.kl_col[first].sum()) == 4 * group
    assert backward(sum((zeros * x).sum() for x in losses)) == 0
    assert backward(losses.ce_row[first].sum() + (losses.kl_row * zeros).sum()) == 3 * group


@pytest.mark.parametrize("backend", TILED)
def test_the_same_bits_twice(backend):
    def once():
        image, text, scale, reference = batch()
        labels = torch.arange(N) % 50
        losses = contrastive(image, text, scale, **reference, labels=labels, backend=backend)
        sum(x.mean() for x in losses).backward()
        return (*losses, image.grad, text.grad, scale.grad)

    assert all(map(torch.equal, once(), once()))


@pytest.mark.parametrize("of", ["product", "sum", "weighted sum"])
@pytest.mark.parametrize("backend", TILED)
def test_a_second_derivative_is_refused(backend, of):
    """A sum's upstream gradient requires no grad; the terms of labels are refused with the rest."""
    image, text, scale, _ = batch()
    call = {"labels": torch.arange(len(image)) // 2, "backend": backend}
    weights = torch.ones(2, len(image))
    if of == "weighted sum":
        total = weighted_contrastive(image, text, scale, weights, **call).total
    else:
        factor = image[:, 0] if of == "product" else 1.0
        total = (contrastive(image, text, scale, **call).ce_row * factor).sum()
    gradient = torch.autograd.grad(total, image, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("backend", TILED)
def test_an_upstream_gradient_that_is_not_finite_spoils_its_group_alone(backend, bad):
    image, text, scale, _ = batch()
    n = len(image) // 2
    losses = contrastive(image, text, scale, groups=(n, len(image) - n), backend=backend)
    upstream = torch.ones(len(image))
    upstream[0] = bad
    gradient = torch.autograd.grad(losses.ce_row, image, upstream)[0]
    assert gradient[n:].isfinite().all()
    assert not gradient[0].isfinite().all()


@pytest.mark.parametrize("backend", TILED)
def test_a_reference_of_a_wider_dtype_is_computed_in_that_of_the_features(backend):
    image, text, scale, _ = batch()
    reference = {"ref_image": image.detach(), "ref_text": text.detach().flip(0)}
    expected = contrastive(image, text, scale, **reference, ref_scale=9.0, backend=backend)
    wide = {name: value.double() for name, value in reference.items()}
    found = contrastive(image, text, scale, **wide, ref_scale=9.0, backend=backend)
    assert all(map(torch.equal, found, expected))


_PEAK = """
import sys, torch, fasterase.objective as objective
from fasterase.ops.contrastive import cpu
cpu._KEPT_BYTES = 0
def status(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key + ":"))
    return int(line.split()[1]) / 1024
def batch(n):
    return [torch.nn.functional.normalize(torch.randn(n, 64), dim=1) for _ in range(4)]
def run(image, text, ref_image, ref_text):
    image.requires_grad_(), text.requires_grad_()
    n = len(image)
    loss = objective.erase_loss(image, text, torch.tensor(50.0, requires_grad=True), ref_image,
        ref_text, 50.0, n_forget=n // 2, forget_loss="contrastive", negatives=sys.argv[2],
        anchor_weight=1.0, labels=torch.arange(n) // 2, backend=sys.argv[1])
    loss.total.backward()
torch.set_num_threads(1)
run(*batch(64))
inputs = batch(6144)
before = status("VmRSS")
run(*inputs)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("backend", TILED)
def test_peak_memory_holds_no_square_matrix(backend):
    """6144^2 fp32 is 144 MB; [N, D] is 1.5 MB here, and tiles take about 10."""
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, backend, "joint"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 60
