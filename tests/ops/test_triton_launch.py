"""Plans of the launches of a step, and launches through handles, with a driver that does none."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("triton")
import triton
from triton.runtime.errors import OutOfResources

from benchmarks.loss.gpu_model import host_time
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive import triton_launch
from fasterase.ops.contrastive.triton_launch import Launcher
from fasterase.ops.contrastive.triton_plan import count_slots, plan_strips, strip_stride

pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5),
    reason="the kernels need Triton 3.5",
)


@pytest.fixture
def compiled():
    """Names of the kernels that do not go through a handle."""
    found = []
    with host_time.fake_driver():
        compile_and_launch = triton_launch._compile_and_launch

        def spy(kernel, *arguments):
            found.append(kernel.__name__)
            return compile_and_launch(kernel, *arguments)

        with mock.patch.object(triton_launch, "_compile_and_launch", new=spy):
            yield found


@pytest.mark.parametrize(("has_ref", "count"), [(False, 9), (True, 10)])
def test_all_steps_after_the_first_go_through_handles(compiled, has_ref, count):
    step = host_time.triton_step(has_ref)
    step()
    kernels = set(compiled)
    assert len(compiled) == count
    compiled.clear()
    step()
    assert not compiled
    launched = []
    with host_time.fake_driver(launched):
        step()
        step()
    assert len(launched) == 2 * count
    assert set(launched) == kernels


def test_a_profiler_s_hooks_see_every_launch(compiled, monkeypatch):
    step = host_time.triton_step(has_ref=False)
    step()
    compiled.clear()
    hooks = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hooks)
    step()
    assert len(compiled) == 9


@pytest.mark.parametrize("has_ref", [False, True])
def test_a_step_never_waits_for_the_device(has_ref):
    """So a CUDA graph can capture it: on meta tensors whatever asks for a value raises."""
    no_context = mock.patch.object(
        triton_backend, "_on_device", return_value=contextlib.nullcontext()
    )
    with host_time.fake_driver(), no_context:
        losses, d_image, d_text, d_scale = host_time.triton_step(has_ref, "meta")()
    assert {x.device.type for x in (losses, d_image, d_text, d_scale)} == {"meta"}
    assert losses.shape == (4 if has_ref else 2, 64)
    assert d_image.shape == d_text.shape == (64, 64)


def test_a_gpu_with_less_shared_memory_runs_with_fewer_stages():
    tried = []

    class Kernel:
        __name__ = "strip"

        def __getitem__(self, grid):
            def run(*args, num_stages, **options):
                tried.append(num_stages)
                if num_stages > most:
                    raise OutOfResources(98304 * num_stages, 101376, "shared memory")

            return run

    most = 2
    launcher = Launcher({}, None)
    with pytest.warns(UserWarning, match="strip needs more .* 2 stages"):
        launcher(Kernel(), (1, 1), num_stages=3)
    assert tried == [3, 2]
    most = 0
    with pytest.raises(OutOfResources), pytest.warns(UserWarning, match="1 stage"):
        launcher(Kernel(), (1, 1), num_stages=2)


def test_rows_of_the_host_s_time():
    found = {(row["step"], row["loss"]): row for row in host_time.rows(30)}
    assert [found["triton", loss]["launches"] for loss in ("InfoNCE", "InfoNCE + KL")] == [9, 10]
    for loss in ("InfoNCE", "InfoNCE + KL"):
        assert 0 < found["triton", loss]["ms"] < found["dense", loss]["ms"]


@pytest.mark.parametrize("n", [1, 300, 1000])
@pytest.mark.parametrize("elements", [0, 40_000, 10**9])
def test_strips_cover_every_row_once(n, elements):
    strips = plan_strips(n, elements, 32)
    assert [row for rows in strips for row in range(n)[rows]] == list(range(n))
    assert all(rows.start % 32 == 0 for rows in strips)
    longest = max(rows.stop - rows.start for rows in strips)
    assert longest == strips[0].stop
    assert longest * strip_stride(n) <= max(elements, 32 * strip_stride(n))
    assert elements < 10**9 or len(strips) == 1


def test_strips_are_equally_long():
    """12,000 rows of 11,136: in two, the second would fill a fraction of a GPU."""
    assert plan_strips(12_000, 2**27, 128) == [slice(0, 6016), slice(6016, 12_000)]


def test_slots_are_few():
    assert [count_slots(n, 128) for n in (0, 1, 128, 129, 4096, 4097, 2**20)] == [
        *(0, 1, 1, 2, 32, 17, 32)
    ]
