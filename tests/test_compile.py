"""The losses under torch.compile, as one graph: eager's numbers, whatever the sizes."""

from __future__ import annotations

import functools

import pytest
import torch

import fasterase
from fasterase import losses
from fasterase.ops.contrastive import contrastive
from tests.ops.calls import needs_kernels

pytestmark = pytest.mark.slow

BACKENDS = [pytest.param("cpu", marks=needs_kernels), "dense"]
SIZES = (40, 52, 57)  # from the second on with symbolic sizes


def features(n, *, labelled):
    """(image, text, scale, ref_image, ref_text, ref_scale, labels)."""
    torch.manual_seed(n)
    sides = [torch.nn.functional.normalize(torch.randn(n, 8)) for _ in range(4)]
    image, text = (side.requires_grad_() for side in sides[:2])
    labels = torch.randint(-3, 9, (n,)) if labelled else None
    return image, text, torch.tensor(30.0, requires_grad=True), *sides[2:], 20.0, labels


def gradients(function, inputs):
    total = function(*inputs)
    return (total, *torch.autograd.grad(total, inputs[:3]))


def check(function, calls):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for call in calls:
        for found, value in zip(gradients(compiled, call), gradients(function, call), strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)


# Without both it is what the losses call.
@pytest.mark.parametrize(
    ("backend", "labelled", "grouped"),
    [
        pytest.param("cpu", False, True, marks=needs_kernels),
        pytest.param("cpu", True, False, marks=needs_kernels),
        ("dense", True, True),
    ],
)
def test_contrastive(backend, labelled, grouped):
    def total(*call):
        names = ("ref_image", "ref_text", "ref_scale", "labels", "groups")
        options = dict(zip(names, call[3:], strict=True))
        found = contrastive(*call[:3], **options, backend=backend)
        return sum(weight * x.mean() for weight, x in enumerate(found, 1))

    groups = [(n // 3, n - n // 3) if grouped else None for n in SIZES]
    calls = [features(n, labelled=labelled) for n in SIZES]
    check(total, [(*call, sizes) for call, sizes in zip(calls, groups, strict=True)])


@pytest.mark.parametrize(
    ("backend", "labelled", "negatives"),
    [
        pytest.param("cpu", False, "own", marks=needs_kernels),
        pytest.param("cpu", True, "joint", marks=needs_kernels),
        ("dense", True, "own"),
        ("dense", True, "joint"),
    ],
)
def test_erase_loss(backend, negatives, labelled):
    def total(*call):
        *call, labels, n_forget = call
        options = {"labels": labels, "negatives": negatives, "backend": backend}
        loss = fasterase.erase_loss(*call, n_forget=n_forget, anchor_weight=1.0, **options)
        return loss.total

    sizes = ((40, 0), (40, 12), (52, 52), (57, 11))
    check(total, [(*features(n, labelled=labelled), n_forget) for n, n_forget in sizes])


@pytest.mark.parametrize("name", ["ClipLoss", "DistillClipLoss"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_of_open_clip(backend, name, monkeypatch):
    for function in ("contrastive", "weighted_contrastive"):
        chosen = functools.partial(getattr(losses, function), backend=backend)
        monkeypatch.setattr(losses, function, chosen)
    loss = getattr(fasterase, name)()

    def total(*call):
        found = loss(*call)
        return found if name == "ClipLoss" else found[0] + 3 * found[1]

    width = 3 if name == "ClipLoss" else 6
    check(total, [features(n, labelled=False)[:width] for n in SIZES])


@needs_kernels
@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_inductor(backend):
    """Of `dense` it compiles every operation anew, and once made wrong gradients of one."""
    image, text, scale, *_ = features(40, labelled=False)

    def total(image, text, scale):
        return contrastive(image, text, scale, backend=backend).ce_row.sum()

    torch._dynamo.reset()
    # Its cache would return code for the instructions of another ATEN_CPU_CAPABILITY.
    step = torch.compile(total, fullgraph=True, options={"fx_graph_cache": False})
    compiled = gradients(step, (image, text, scale))
    for found, value in zip(compiled, gradients(total, (image, text, scale)), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
