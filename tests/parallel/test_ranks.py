"""The process group that a run with DeepSpeed leaves for the next one, and that of the caller."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from fasterase.parallel import ranks
from fasterase.parallel.ranks import ALONE, join_ranks


@pytest.fixture(autouse=True)
def no_group(monkeypatch):
    monkeypatch.setattr(ranks, "_serves_deepspeed", lambda: True)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    ranks._kept.clear()


def make_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_group_for_deepspeed_lasts_until_another_number_of_processes_is_launched(monkeypatch):
    for _ in range(2):
        with join_ranks(alone_too=True) as found:
            assert found is ALONE
            group = dist.group.WORLD
        assert dist.group.WORLD is group
    with join_ranks() as found:
        assert found is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="WORLD_SIZE=2, but RANK"), join_ranks():
        pass
    assert not dist.is_initialized()


def test_a_group_that_deepspeed_has_not_used_is_left(monkeypatch):
    monkeypatch.setattr(ranks, "_serves_deepspeed", lambda: False)
    with join_ranks(alone_too=True):
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_a_group_of_the_caller_s_is_left_in_place():
    with join_ranks(alone_too=True):
        ours = dist.group.WORLD
    dist.destroy_process_group()
    make_group()
    group = dist.group.WORLD
    with join_ranks():
        pass
    ranks._leave(ours)  # as at the end of the process
    assert dist.group.WORLD is group
