"""Special to the C++ backend: its build, its registration with torch, threads, kept logits."""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fasterase
from fasterase.cli import main
from fasterase.errors import InputError
from fasterase.ops.contrastive import api, contrastive, cpu, explain_backend
from tests.ops.calls import features, weighted_mean

# Only without a compiler: kernels that do not compile must fail here, not be passed over.
COMPILER = os.environ.get("CXX", "c++")
needs_kernels = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} here")


loss = functools.partial(weighted_mean, backend="cpu")


def gradients(function, inputs):
    total = function(*inputs)
    return (total, *torch.autograd.grad(total, inputs[:3]))


@needs_kernels
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (2, 2), (3, 3), (3, 1)])
def test_threads_change_the_tiles_but_hardly_the_numbers(forward, backward):
    inputs = features(300, 64)
    expected = gradients(lambda *x: weighted_mean(*x, "chunked"), inputs)
    before = torch.get_num_threads()
    runs = []
    try:
        for _ in range(2):
            torch.set_num_threads(forward)
            total = loss(*inputs)
            torch.set_num_threads(backward)
            runs.append((total, *torch.autograd.grad(total, inputs[:3])))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))
    torch.testing.assert_close(runs[0], expected, rtol=1e-4, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.99])
def test_kept_logits_change_no_bit(share, monkeypatch):
    inputs = features(100, 8)
    monkeypatch.setattr(cpu, "_TILE", 16)
    expected = gradients(loss, inputs)
    monkeypatch.setattr(cpu, "_KEPT_BYTES", int(share * 2 * 100 * 100 * 4))
    assert all(map(torch.equal, gradients(loss, inputs), expected))


@needs_kernels
def test_graphs_alive_at_once_share_no_kept_logits():
    """The memory of a finished step serves the next one, and only then. 3 MB: large enough to."""
    batches = [features(620, 8, seed=seed) for seed in range(3)]
    small = features(300, 8, seed=3)
    expected = [gradients(loss, inputs)[1:] for inputs in (*batches, small)]
    for _ in range(2):
        totals = [loss(*inputs) for inputs in (*batches, small)]
        for inputs, total, exact in zip((*batches, small), totals, expected, strict=True):
            assert all(map(torch.equal, torch.autograd.grad(total, inputs[:3]), exact))


@needs_kernels
def test_rows_may_lie_apart():
    image, text, *rest = features(50, 8)
    expected = gradients(loss, (image, text, *rest))
    inside = torch.zeros(50, 20)
    inside[:, 4:12] = image.detach()
    apart = inside[:, 4:12].requires_grad_()
    turned = text.detach().t().contiguous().t().requires_grad_()
    found = gradients(loss, (apart, turned, *rest))
    assert all(map(torch.equal, found, expected))


@needs_kernels
def test_rows_may_overlap():
    image, text, *rest = features(70, 8)
    windows = torch.randn(77).unfold(0, 8, 1)
    for overlapping in (windows, windows[:1].expand(70, 8), windows.half()):
        for sides in ((overlapping, text), (image, overlapping)):
            found = gradients(loss, (*(each.detach().requires_grad_() for each in sides), *rest))
            copies = (each.detach().clone().requires_grad_() for each in sides)
            assert all(map(torch.equal, found, gradients(loss, (*copies, *rest))))


@needs_kernels
@pytest.mark.parametrize(("n", "width"), [(1, 8), (4, 0)])
def test_blas_is_given_no_stride_that_it_refuses(n, width, capfd):
    """It would say so, and compute nothing."""
    image, text, *_ = features(n, width)
    image, text = (
        x.detach().as_strided((n, width), (1, n)).requires_grad_() for x in (image, text)
    )
    losses = contrastive(image, text, torch.tensor(3.0, requires_grad=True), backend="cpu")
    (losses.ce_row + losses.ce_col).sum().backward()
    assert losses.ce_row.tolist() == pytest.approx([math.log(n)] * n)
    assert image.grad.shape == (n, width)
    assert not any(capfd.readouterr())


@needs_kernels
def test_small_numbers_survive_the_library():
    """-ffast-math in a shared library would flush them to zero for the whole process."""
    assert (torch.tensor([1e-40]) * torch.tensor([1.0])).item() > 0


@needs_kernels
def test_compile_command(capsys):
    assert main(["compile"]) == 0
    path = capsys.readouterr().out.split()[-1]
    assert Path(path).is_file()


@needs_kernels
def test_auto_takes_it_for_cpu_tensors():
    image, text, scale, *_ = features()
    assert "cpu" in fasterase.available_backends()
    assert explain_backend(image, text, scale).name == "cpu"


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(cpu, "load_kernels", lambda: None)
    elsewhere = torch.empty(2, 2, device="meta")
    with pytest.raises(InputError, match="takes CPU tensors; image is on meta"):
        api.choose_backend("cpu", (elsewhere, elsewhere))


def python(program, **environment):
    """Start a fresh interpreter on `program`, with a cache of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_WITHOUT_COMPILER = """
import torch, warnings, fasterase
x = torch.eye(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fasterase.contrastive(x, x, 2.0)
assert [w.category for w in caught] == [UserWarning], caught
print(caught[0].message)
print(fasterase.explain_backend(x, x, 2.0))
print(fasterase.available_backends())
try:
    fasterase.contrastive(x, x, 2.0, backend="cpu")
except fasterase.InputError as error:
    print(error)
"""


def test_without_a_compiler_torch_tiles_run_and_one_warning_says_so(tmp_path):
    process = python(_WITHOUT_COMPILER, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="no-such-compiler")
    out, err = process.communicate()
    assert process.returncode == 0, err
    warning, choice, names, error = out.splitlines()
    assert "slower: no C++ compiler (no-such-compiler is not on PATH)" in warning
    assert choice.startswith("chunked, fp32 products: auto")
    assert "cpu" not in names
    assert "backend='cpu' is not available in this installation: no C++ compiler" in error


_BUILD = """
from fasterase.ops.contrastive.cpu import load_library
print(load_library())
"""


# Compiling takes long; a copy of what it would give does as well.
_REBUILD = """
import os, pathlib
from fasterase.ops.contrastive import cpu
whole = pathlib.Path(os.environ["WHOLE"]).read_bytes()
calls = []
def copy(name, sources, library):
    calls.append(name)
    library.write_bytes(whole)
cpu._compile_library = copy
reason = cpu.load_kernels()
print(len(calls), reason and reason.replace(" ", "_"))
"""


@pytest.mark.slow
@needs_kernels
def test_processes_may_build_at_once(tmp_path):
    builders = [python(_BUILD, TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(2)]
    results = [process.communicate() for process in builders]
    assert [process.returncode for process in builders] == [0, 0], results
    (library, said), (other, also_said) = results  # beside what torch says of a missing GPU
    assert library == other
    assert (said + also_said).count("compiling the C++ kernels") == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".so", ".lock"}


@pytest.mark.slow
@needs_kernels
def test_a_damaged_library_is_built_again_once(tmp_path, monkeypatch):
    """In processes of their own: a truncated library could kill one."""
    whole = cpu.build_library()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    damaged = tmp_path / whole.name
    for content in (whole.read_bytes()[:-1000], b"\x7fELF\2", b"no library"):
        damaged.write_bytes(content)
        process = python(_REBUILD, WHOLE=str(whole))
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.split()[-2:] == ["1", "None"]
        assert damaged.read_bytes() == whole.read_bytes()
    damaged.write_bytes(b"no library")
    process = python(_REBUILD, WHOLE=str(damaged))
    out, err = process.communicate()
    assert process.returncode == 0, err
    calls, reason = out.split()[-2:]
    assert calls == "1"
    assert damaged.name in reason


@needs_kernels
def test_a_library_runs_without_its_compiler(tmp_path, monkeypatch):
    whole = cpu.build_library()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(whole.parent))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu.build_library() == max(
        whole.parent.glob(f"{whole.stem.rpartition('_')[0]}_*.so"), key=os.path.getmtime
    )
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(cpu.BuildError, match="no-such-compiler is not on PATH"):
        cpu.build_library()


@pytest.mark.parametrize("knows_openmp", [True, False])
def test_a_failing_compiler_is_a_reason(knows_openmp, tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "broken-g++"  # torch looks for a name that it knows
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exec c++ --version\n'
        f'case "$*" in *-fsyntax-only*) {"exit 0" if knows_openmp else ":"};; esac\n'
        "echo 'x.cpp:1:1: error: nothing works' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    with pytest.raises(cpu.BuildError, match=r"failed .*nothing|cannot compile them .*nothing"):
        cpu.build_library()
    assert ("about a minute" in capsys.readouterr().err) == knows_openmp  # else not even begun
    assert [path.suffix for path in cache.glob("*")] == [".lock"]


@needs_kernels
def test_fake_tensors_pass_through_losses_and_gradients():
    with FakeTensorMode():
        image, text, scale, *_ = features(12)
        image, text, scale = (x.detach().requires_grad_() for x in (image, text, scale))
        losses = contrastive(image, text, scale, labels=torch.arange(12) // 2, backend="cpu")
        (losses.ce_row + losses.ce_col).sum().backward()
    assert losses.ce_row.shape == (12,)
    assert losses.kl_row is None
    assert [x.grad.shape for x in (image, text, scale)] == [(12, 8), (12, 8), ()]
