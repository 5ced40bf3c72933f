"""Calls of the operator made from the oracle's batches, and the distance from its results."""

from __future__ import annotations

import numpy as np
import torch

from fasterase.ops.contrastive import contrastive

INPUTS = ("image", "text", "scale")


def rounded(batch, dtype=torch.float32):
    """The batch as `dtype` holds it, so that the oracle sees what the operator sees."""
    for name in ("image", "text", "ref_image", "ref_text"):
        value = getattr(batch, name)
        if value is not None:
            setattr(batch, name, torch.tensor(value).to(dtype).double().numpy())
    batch.scale = float(np.float32(batch.scale))
    return batch


def tensors(batch, dtype=torch.float32, *, scale_dtype=torch.float64, device="cpu"):
    """Keyword arguments of a call, the differentiable ones first; fp32 holds the batch exactly."""

    def tensor(name):
        is_scale = name.endswith("scale")
        return torch.tensor(
            getattr(batch, name), dtype=scale_dtype if is_scale else dtype, device=device
        )

    call = {name: tensor(name).requires_grad_() for name in INPUTS}
    if batch.ref_image is not None:
        call |= {name: tensor(name) for name in ("ref_image", "ref_text", "ref_scale")}
    if batch.labels is not None:
        call["labels"] = torch.tensor(batch.labels, device=device)
    return call


def without_reference(call):
    return {name: value for name, value in call.items() if not name.startswith("ref_")}


def run(call, upstream, groups=None, backend="auto"):
    """Losses and the gradients of (upstream * losses).sum() in image, text and scale."""
    losses = [x for x in contrastive(**call, groups=groups, backend=backend) if x is not None]
    total = sum(
        (torch.tensor(w, device=x.device) * x.double()).sum()
        for w, x in zip(upstream, losses, strict=False)
    )
    return losses, torch.autograd.grad(total, [call[name] for name in INPUTS])


def relative_error(found, expected, scale):
    """Of each value, or of 1e-2 x max(1, scale / 10) where the value is smaller."""
    expected = np.asarray(expected)
    error = np.abs(found.detach().double().cpu().numpy() - expected)
    floor = 1e-2 * max(1.0, scale / 10)
    return float((error / np.maximum(np.abs(expected), floor)).max(initial=0.0))


def norm_error(found, expected):
    error = np.linalg.norm(found.detach().double().cpu().numpy() - expected)
    return float(error / np.linalg.norm(expected))


def assert_same_bits(left, right):
    """Of two sequences of tensors."""
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def features(n=40, width=8, dtype=torch.float32, *, seed=0, feature_dtype=None):
    """Random unit rows and scales, in the order of the operators' arguments."""
    torch.manual_seed(seed)
    sides = [torch.nn.functional.normalize(torch.randn(n, width, dtype=dtype)) for _ in range(4)]
    image, text, ref_image, ref_text = (side.to(feature_dtype or dtype) for side in sides)
    scale, ref_scale = (torch.tensor(x, dtype=dtype) for x in (30.0, 20.0))
    differentiable = (x.requires_grad_() for x in (image, text, scale))
    return *differentiable, ref_image, ref_text, ref_scale


def weighted_mean(image, text, scale, ref_image, ref_text, ref_scale, backend):
    """Of all four losses."""
    reference = {"ref_image": ref_image, "ref_text": ref_text, "ref_scale": ref_scale}
    losses = contrastive(image, text, scale, **reference, backend=backend)
    return sum(weight * x.mean() for weight, x in enumerate(losses, 1))
