"""The stated accuracy of the tiled backends on the CPU; Triton's is held where its tests run."""

from __future__ import annotations

import pytest
import torch

from fasterase.ops.contrastive import available_backends
from tests.ops import criterion_checks, test_contrastive

TILED = [name for name in available_backends() if name not in ("dense", "triton")]


@pytest.mark.parametrize(("shape", "scale", "labelled"), criterion_checks.CASES)
@pytest.mark.parametrize("backend", TILED)
def test_near_the_oracle_and_no_worse_than_eager(backend, shape, scale, labelled):
    for options in criterion_checks.OPTIONS:
        criterion_checks.check(backend, shape, scale, labelled, **options)


@pytest.mark.parametrize(("shape", "scale", "labelled"), criterion_checks.CASES)
@pytest.mark.parametrize("backend", TILED)
def test_with_weights_of_one(backend, shape, scale, labelled):
    """N(0, 1) upstream, so that single elements of the gradients stand above the floor."""
    batch = criterion_checks.batch_of(shape, scale, labelled)
    test_contrastive.check(batch, None, backend, torch.float32, criterion_checks.RELATIVE)
