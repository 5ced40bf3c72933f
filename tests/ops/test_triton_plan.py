"""Tables of the Triton launches under the capture of a CUDA graph, which holds their addresses."""

from __future__ import annotations

import pytest
import torch

from fasterase.errors import InputError

pytest.importorskip("triton")
from fasterase.ops.contrastive import triton_plan
from fasterase.ops.contrastive.triton_plan import strip_launches, sum_tables

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    def switch(on):
        monkeypatch.setattr(triton_plan, "_is_capturing", lambda: on)

    return switch


@pytest.mark.parametrize(
    "tables",
    [
        lambda n: sum_tables((n, 9), 16, 16, CPU).items,
        lambda n: strip_launches((n, 9), 2**20, 16, 16, CPU)[0].table,
    ],
)
def test_what_a_graph_reads_outlives_other_shapes(tables, capturing):
    tables(1)
    capturing(True)
    captured = tables(1)
    capturing(False)
    tables(2)
    for n in range(3, 80):
        tables(n)
    capturing(True)
    assert tables(1) is captured
    with pytest.raises(InputError, match="once before the capture"):
        tables(2)
