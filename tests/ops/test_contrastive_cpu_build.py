"""The C++ library: built on first use, or shipped in a wheel, and without it torch tiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch._inductor.config  # noqa: F401  it keeps the CXX of its first import, for all tests

from fasterase.cli import main
from fasterase.ops.contrastive import cpu
from tests.ops.calls import needs_kernels

ROOT = Path(__file__).resolve().parents[2]


def run_python(program, *arguments, cwd=None, **environment):
    """The lines that a fresh interpreter prints for `program`."""
    process = start_python(program, *arguments, cwd=cwd, **environment)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out.splitlines()


def start_python(program, *arguments, cwd=None, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_kernels
def test_compile_command(capsys):
    assert main(["compile"]) == 0
    assert Path(capsys.readouterr().out.split()[-1]).is_file()


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
    bare = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    warning, choice, names, error = run_python(_WITHOUT_COMPILER, **bare)
    assert "slower: no C++ compiler (no-such-compiler is not on PATH)" in warning
    assert choice.startswith("chunked, fp32 products: auto")
    assert "cpu" not in names
    assert "backend='cpu' is not available in this installation: no C++ compiler" in error


# Compiling takes long; a copy of what it would give does as well.
_BUILD = """
import os, pathlib, shutil, time
from torch.utils import cpp_extension
from fasterase.ops.contrastive.cpu import load_library
def compile(name, sources, *, build_directory, **_):
    time.sleep(3)
    shutil.copy(os.environ["WHOLE"], pathlib.Path(build_directory) / f"{name}.so")
cpp_extension.load = compile
print(load_library())
"""


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
    where = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "WHOLE": str(cpu.build_library())}
    builders = [start_python(_BUILD, **where) for _ in range(2)]
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
        assert run_python(_REBUILD, WHOLE=str(whole))[-1] == "1 None"
        assert damaged.read_bytes() == whole.read_bytes()
    damaged.write_bytes(b"no library")
    calls, reason = run_python(_REBUILD, WHOLE=str(damaged))[-1].split()
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


_USE = """
import sys, torch, fasterase
from fasterase.ops.contrastive import cpu
torch.__version__ = sys.argv[1] or torch.__version__
x = torch.randn(9, 4, requires_grad=True)
choice = fasterase.explain_backend(x, x, 2.0)
print(fasterase.__file__)
print(choice)
if choice.name == "cpu":
    print(cpu.load_library())
    names = ("cpu", "dense")
    found, exact = (fasterase.contrastive(x, x.flip(0), 2.0, backend=name) for name in names)
    torch.testing.assert_close(found.ce_col, exact.ce_col)
"""


def test_the_best_library_for_this_cpu_and_torch_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "files", lambda _: tmp_path)
    for variant in ("AVX512", "DEFAULT"):
        (tmp_path / f"{cpu.name_variant(variant)}.so").touch()
    (tmp_path / "contrastive_torch2_7_AVX2.so").touch()
    for capability, usable in {"AVX512": 2, "AVX2": 1, "DEFAULT": 1, "SVE256": 1}.items():
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda c=capability: c)
        assert len(cpu._find_shipped()) == usable
    monkeypatch.setattr("torch.__version__", "2.7.1")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert [path.name for path in cpu._find_shipped()] == ["contrastive_torch2_7_AVX2.so"]


@pytest.mark.slow
@needs_kernels
def test_a_wheel_is_built_installed_and_used_without_a_compiler(tmp_path):
    tree = tmp_path / "tree"
    for name in ("fasterase", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    hasty = tree / "fasterase" / "ops" / "contrastive" / "cpu.py"
    assert '"-O3"' in hasty.read_text()
    hasty.write_text(hasty.read_text().replace('"-O3"', '"-O1"'))  # in half the time

    build = "import setuptools.build_meta as b; b.build_wheel('..')"
    nowhere = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}
    run_python(build, cwd=tree, FASTERASE_WHEEL="DEFAULT", **nowhere)
    (wheel,) = tmp_path.glob("fasterase-*-cp310-abi3-*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, format="zip")

    bare = {"PATH": "", "CXX": "no-such-compiler", "PYTHONPATH": str(installed), **nowhere}
    library = installed / "fasterase" / "csrc" / f"{cpu.name_variant('DEFAULT')}.so"
    location, choice, loaded = run_python(_USE, "", cwd=tmp_path, **bare)
    assert Path(location).parent == installed / "fasterase"
    assert choice.startswith("cpu, fp32 products")
    assert Path(loaded) == library
    # Made for a torch that is not this one, by its name or by its contents.
    _, choice = run_python(_USE, "2.99.0", cwd=tmp_path, **bare)
    assert choice.startswith("chunked")
    library.write_bytes(b"no library")
    _, choice = run_python(_USE, "", cwd=tmp_path, **bare)
    assert choice.startswith("chunked")
    assert "no C++ compiler" in choice
