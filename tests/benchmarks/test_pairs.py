"""The benchmark of shards: both implementations read the same, and the large index is one."""

from __future__ import annotations

import pytest

from benchmarks import pairs as benchmark
from fasterase.pairs import read_tars


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(read_tars, "KEPT_BYTES", 0)
    (tmp_path / "small").mkdir()
    return benchmark.write_shards(tmp_path / "small", shards=2, pairs=30, side=32)


@pytest.mark.slow
def test_both_find_and_read_the_same_pairs(shards):
    for kind, runs in benchmark.STAGES.values():
        if kind not in ("small", "pictures"):
            continue
        found = [run(shards) for run in runs.values()]
        assert {each["pairs"] for each in found} == {60}
        assert len({each.get("found") for each in found}) == 1


@pytest.mark.slow
def test_the_large_index_is_read_like_any_other(shards, tmp_path):
    (tmp_path / "large").mkdir()
    large = benchmark.write_large(tmp_path / "large", shards[0], pairs=100)
    figures = {
        stage: runs["fasterase"](large)
        for stage, (kind, runs) in benchmark.STAGES.items()
        if kind == "large"
    }
    assert figures["large open"]["pairs"] == figures["large split"]["pairs"] == 120
    assert 0 < figures["large overlap"]["found"] < 20
    assert figures["large draw"]["step_ms"] > 0
    rows = [
        {"stage": "x", "implementation": "y", "pairs_per_second": 1.0, **each}
        | {"pairs_per_cpu_second": 2.0}
        for each in figures.values()
    ]
    assert "120" in benchmark.summarise(rows)
