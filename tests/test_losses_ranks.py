"""The losses on two processes against open_clip's, and the errors of their arguments."""

from __future__ import annotations

import pytest
import torch

import fasterase
from fasterase.errors import InputError
from tests.loss_ranks import run_rank

pytestmark = pytest.mark.slow


def test_two_ranks_have_open_clips_values_and_gradients(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(2, str(tmp_path / "meeting")), nprocs=2)


@pytest.mark.parametrize("name", ["ClipLoss", "DistillClipLoss"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"world_size": 0}, "world_size=0 must be 1 or more"),
        ({"world_size": 2, "rank": 2}, "rank=2 must be from 0 to world_size - 1"),
        ({"rank": -1}, "rank=-1 must be"),
        ({"world_size": 2, "use_horovod": True}, "use_horovod=True with world_size=2"),
    ],
)
def test_wrong_arguments(name, options, named):
    with pytest.raises(InputError, match=named):
        getattr(fasterase, name)(**options)


def test_without_a_process_group():
    loss_of = fasterase.ClipLoss(world_size=2, local_loss=True)
    with pytest.raises(InputError, match="world_size=2: this process is in no process group"):
        loss_of(torch.eye(3), torch.eye(3), 1.0)
