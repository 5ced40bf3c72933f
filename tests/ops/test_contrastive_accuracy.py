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
import pytest
import torch

from fasterase.objective import erase_loss
from fasterase.ops.contrastive import contrastive
from tests import oracle
from tests.ops.calls import INPUTS, IS_INTERPRETED, each_tiled_backend, leaves, make

RELATIVE = 3e-4
SHAPES = (((123, 80), 48), ((67, 33), 33), ((130, 64), 96), ((65, 128), 128), ((252, 507), 507))
# With no forget row, or no other, both `negatives` make the same single matrix.
OPTIONS = list(itertools.product(("own", "joint"), (True, False)))  # negatives, has_retain
if IS_INTERPRETED:  # options and labels in turn; the large shape, which takes seconds, once
    CASES = [
        (
            SHAPES[number // 2],
            (14.3, 100.0)[number % 2],
            number // 2 % 2 == 0,
            [OPTIONS[number % 4]],
        )
        for number in range(9)
    ]
else:
    CASES = list(itertools.product(SHAPES, (14.3, 100.0), (False, True), [OPTIONS]))


def expected(batch, n_forget, negatives):
    """Name to value, of every output."""
    losses, _ = oracle.contrastive(batch, np.zeros((4, len(batch.image))))
    terms, gradient = oracle.erase_loss(
        batch, n_forget=n_forget, negatives=negatives, forget_loss="contrastive"
    )
    return {
        **dict(zip(("ce_row", "ce_col", "kl_row", "kl_col"), losses, strict=True)),
        **terms,
        **{f"d_{name}": getattr(gradient, name) for name in INPUTS},
    }


def found(backend, call, n_forget, negatives):
    options = {"negatives": negatives, "forget_loss": "contrastive", "backend": backend}
    loss = erase_loss(**call, n_forget=n_forget, **options)
    gradients = torch.autograd.grad(loss.total, leaves(call))
    return {
        **contrastive(**call, backend=backend)._asdict(),
        **loss._asdict(),
        **{f"d_{name}": gradient for name, gradient in zip(INPUTS, gradients, strict=True)},
    }


@pytest.mark.parametrize(("shape", "scale", "labelled", "options"), CASES)
@each_tiled_backend
def test_near_the_oracle_and_no_worse_than_eager(backend, shape, scale, labelled, options):
    (n, width), ref_width = shape
    labels = n // 2 if labelled else None
    call, batch = make(n, width, scale, ref_width=ref_width, labels=labels, seed=n)
    floor = 1e-2 * max(1.0, scale / 10)  # of an element, or a term, that is smaller
    for negatives, has_retain in options:
        n_forget = 0 if has_retain else n
        values = expected(batch, n_forget, negatives)
        outputs, eager = (found(name, call, n_forget, negatives) for name in (backend, "dense"))
        assert outputs.keys() == values.keys()
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
