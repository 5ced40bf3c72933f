"""Under TRITON_INTERPRET=1 all kernels run in small tiles."""

from __future__ import annotations

import pytest

from tests.ops.calls import IS_INTERPRETED


@pytest.fixture(autouse=IS_INTERPRETED)
def small_tiles(monkeypatch):
    """Tiles of which every loop runs several times, in seconds."""
    from fasterase.ops.contrastive import triton_plan

    for key in triton_plan.TILES:
        monkeypatch.setitem(triton_plan.TILES, key, triton_plan.Tile(32, 64, 32, 4, 1))
    triton_plan.plan_kernel.cache_clear()
    yield
    triton_plan.plan_kernel.cache_clear()
