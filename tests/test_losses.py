"""`ClipLoss` and `DistillClipLoss` against the classes of open_clip that they stand in for."""

from __future__ import annotations

import inspect

import open_clip.loss
import pytest
import torch

import fasterase
from fasterase.errors import InputError
from tests.loss_ranks import run_rank

NAMES = ("ClipLoss", "DistillClipLoss")


def arguments(name, n=70, width=24, scale=50.0, dtype=torch.float32):
    torch.manual_seed(0)
    shared = torch.randn(n, width)
    sides = [
        torch.nn.functional.normalize(shared + 0.7 * torch.randn(n, width)).to(dtype)
        for _ in range(4)
    ]
    student = [sides[0].requires_grad_(), sides[1].requires_grad_()]
    student.append(torch.tensor(scale, requires_grad=True))
    return student + ([*sides[2:], torch.tensor(20.0)] if name == "DistillClipLoss" else [])


def both(name, *args, **options):
    return [getattr(module, name)()(*args, **options) for module in (fasterase, open_clip.loss)]


def total(result):
    return sum((1, 3)[k] * x for k, x in enumerate(result)) if isinstance(result, tuple) else result


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, scale):
    args = arguments(name, scale=scale)
    found, expected = both(name, *args)
    assert isinstance(found, tuple) == (name == "DistillClipLoss")
    close(found, expected)
    wanted = args[:3]
    close(torch.autograd.grad(total(found), wanted), torch.autograd.grad(total(expected), wanted))
    named = both(name, *args, output_dict=True)
    assert list(named[0]) == list(named[1])
    close(*named)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast(name):
    """open_clip rounds its logits to bf16 there; ours are those of fp32."""
    args = arguments(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, rounded = both(name, *args)
    close(found, getattr(open_clip.loss, name)()(*args))
    close(found, rounded, tolerance=5e-2)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_features(name):
    args = arguments(name, dtype=torch.bfloat16)
    found = getattr(fasterase, name)()(*args)
    exact = getattr(open_clip.loss, name)()(*(x.float() for x in args))
    close(found, exact)


def test_bias_and_scale_of_shape_one():
    args = arguments("ClipLoss")
    args[2] = args[2].detach().reshape(1).requires_grad_()
    found, expected = both("ClipLoss", *args, logit_bias=torch.tensor(-3.0))
    close(found, expected)
    close(torch.autograd.grad(found, args[2]), torch.autograd.grad(expected, args[2]))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_constructor_and_call(name):
    def parameters(library, method):
        return inspect.signature(getattr(getattr(library, name), method)).parameters.values()

    both_libraries = (fasterase, open_clip.loss)
    ours, theirs = (
        [(p.name, p.default) for p in parameters(x, "__init__")] for x in both_libraries
    )
    assert ours == theirs
    ours, theirs = ([p.name for p in parameters(x, "forward")] for x in both_libraries)
    assert ours == theirs


@pytest.mark.slow
def test_two_ranks_have_open_clips_values_and_gradients(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(2, str(tmp_path / "meeting")), nprocs=2)


@pytest.mark.parametrize("name", NAMES)
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


def test_wrong_features_and_no_pairs():
    loss_of = fasterase.ClipLoss()
    for wrong in (None, torch.tensor(1.0), [[1.0]]):
        with pytest.raises(InputError, match="image"):
            loss_of(wrong, torch.ones(2, 3), 1.0)
    image = torch.ones(0, 3, requires_grad=True)
    loss_of(image, torch.ones(0, 3), 10.0).backward()
    assert image.grad.shape == (0, 3)
    none, distil = torch.ones(0, 3), fasterase.DistillClipLoss()
    assert [float(loss) for loss in distil(none, none, 10.0, none, none, 1.0)] == [0.0, 0.0]
    rows = torch.eye(3)
    for teacher, named in (
        ((rows[:2], rows, 1.0), "dist_image_features"),
        ((rows.numpy(), rows, 1.0), "dist_image_features"),
        ((rows, rows, -1.0), "dist_logit_scale"),
    ):
        with pytest.raises(InputError, match=named):
            distil(rows, rows, 1.0, *teacher)


def test_without_a_process_group():
    loss_of = fasterase.ClipLoss(world_size=2, local_loss=True)
    with pytest.raises(InputError, match="world_size=2: this process is in no process group"):
        loss_of(torch.eye(3), torch.eye(3), 1.0)
