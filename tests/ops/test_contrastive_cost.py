"""What a tiled backend costs: products it skips, memory it does not take."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.ops.contrastive import contrastive
from tests.ops.calls import INPUTS, each_tiled_backend, make

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


def batch(wanted=INPUTS, **options):
    call, _ = make(N, D, **options)
    for name in INPUTS:
        call[name].requires_grad_(name in wanted)
    return call | {"backend": "chunked"}


def products(function):
    """How many N x N x D products `function` computes."""
    with MultiplyAdds() as counter:
        function()
    return counter.total / (N * N * D)


@pytest.mark.parametrize(("reference", "forward", "backward"), [(True, 2, 4), (False, 1, 3)])
def test_forward_and_backward_products(reference, forward, backward):
    losses = []
    call = functools.partial(contrastive, **batch(reference=reference))
    assert products(lambda: losses.extend(call())) == forward
    total = sum(loss.sum() for loss in losses if loss is not None)
    assert products(total.backward) == backward


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(("image", "scale"), 2), (("text", "scale"), 2), (("scale",), 2), (("image", "text"), 3)],
)
def test_inputs_without_gradient_cost_nothing(wanted, expected):
    losses = contrastive(**batch(wanted, reference=False))
    assert products((losses.ce_row.sum() + losses.ce_col.sum()).backward) == expected


def test_losses_without_upstream_gradient_cost_nothing():
    losses = contrastive(**batch(), groups=(N // 2, N // 2))
    group = N * N / 4 / N / N  # the products of one group
    first, zeros = slice(0, N // 2), torch.zeros(N)

    def backward(total):
        return products(lambda: total.backward(retain_graph=True))

    assert backward(losses.ce_row.sum()) == 3 * 2 * group  # no product of the reference
    assert backward(losses.ce_row[first].sum()) == 3 * group
    assert backward(losses.kl_col[first].sum()) == 4 * group
    assert backward(sum((zeros * x).sum() for x in losses)) == 0
    assert backward(losses.ce_row[first].sum() + (losses.kl_row * zeros).sum()) == 3 * group


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
@each_tiled_backend
def test_peak_memory_holds_no_square_matrix(backend):
    """6144^2 fp32 is 144 MB; [N, D] is 1.5 MB here, and tiles take about 10."""
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, backend, "joint"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 60
