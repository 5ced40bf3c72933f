"""The accuracy that every tiled backend keeps, on the shapes that it is stated for, in fp32.

Held against the fp64 oracle: the four loss vectors of `contrastive`, and what `erase_loss` makes of
them: its terms and the gradients of its total, upstream weights of 1/N and all. Two bounds:

- relative to the oracle's value, 3e-4;
- the largest absolute error of an output is at most that of `"dense"`, plain torch in fp32, twice,
  or 1e-6 x max(1, scale) where that is more: an error in a logit of scale 100 is 1e-5 in its loss.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from fasterase.objective import erase_loss
from fasterase.ops.contrastive import contrastive
from tests import oracle
from tests.ops.calls import INPUTS, rounded, tensors

RELATIVE = 3e-4
SHAPES = (((123, 80), 48), ((67, 33), 33), ((130, 64), 96), ((65, 128), 128), ((252, 507), 507))
CASES = list(itertools.product(SHAPES, (14.3, 100.0), (False, True)))  # ..., scale, labelled
# With no forget row, or no other, both `negatives` make the same single matrix.
OPTIONS = [
    {"negatives": negatives, "forget_loss": "contrastive", "has_retain": has_retain}
    for negatives in ("own", "joint")
    for has_retain in (True, False)
]


def batch_of(shape, scale, labelled):
    """As fp32 holds it, so that the oracle sees what the operator sees."""
    (n, width), ref_width = shape
    return rounded(
        oracle.clip_like(
            n, width, scale, ref_width=ref_width, num_labels=n // 2 if labelled else None, seed=n
        )
    )


def expected(batch, *, has_retain, **options):
    """Name to value, of every output."""
    n = len(batch.image)
    losses, _ = oracle.contrastive(batch, np.zeros((4, n)))
    terms, gradient = oracle.erase_loss(batch, n_forget=0 if has_retain else n, **options)
    return {
        **dict(zip(("ce_row", "ce_col", "kl_row", "kl_col"), losses, strict=True)),
        **terms,
        **{f"d_{name}": getattr(gradient, name) for name in ("image", "text", "scale")},
    }


def found(backend, batch, *, has_retain, **options):
    call = tensors(batch)
    wanted = [call[name] for name in INPUTS]
    n_forget = 0 if has_retain else len(batch.image)
    loss = erase_loss(**call, n_forget=n_forget, backend=backend, **options)
    gradients = torch.autograd.grad(loss.total, wanted)
    return {
        **contrastive(**call, backend=backend)._asdict(),
        **loss._asdict(),
        **dict(zip(("d_image", "d_text", "d_scale"), gradients, strict=True)),
    }


def check(backend, shape, scale, labelled, **options):
    batch = batch_of(shape, scale, labelled)
    values = expected(batch, **options)
    outputs, eager = (found(name, batch, **options) for name in (backend, "dense"))
    assert outputs.keys() == values.keys()
    floor = 1e-2 * max(1.0, scale / 10)  # of an element, or a term, that is smaller
    for name, value in values.items():
        error, own = (
            np.abs(side[name].detach().double().numpy() - value) for side in (outputs, eager)
        )
        assert (error / np.maximum(np.abs(value), floor)).max() < RELATIVE, name
        if name.startswith("d_"):  # of 1/N weights, below that floor: also as a whole
            # A batch matched to 1e-16 has gradients that fp64's p - 1 does not hold.
            assert np.linalg.norm(error) < RELATIVE * max(np.linalg.norm(value), 1e-9), name
        bound = max(2 * own.max(), 1e-6 * max(1.0, scale))
        assert error.max() <= bound, f"{name}: {error.max():.2e} over {bound:.2e}"
