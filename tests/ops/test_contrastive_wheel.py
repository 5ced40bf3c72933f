"""A wheel with compiled kernels: used without a compiler; under another torch it does no harm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fasterase.ops.contrastive import cpu
from tests.ops.test_contrastive_cpu import needs_kernels

ROOT = Path(__file__).resolve().parents[2]

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

    def python(program, *arguments, cwd, **environment):
        command = [sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "none"), **environment}
        ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout.splitlines()

    build = "import setuptools.build_meta as b; b.build_wheel('..')"
    python(build, cwd=tree, FASTERASE_WHEEL="DEFAULT")
    (wheel,) = tmp_path.glob("fasterase-*-cp310-abi3-*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, format="zip")

    bare = {"PATH": "", "CXX": "no-such-compiler", "PYTHONPATH": str(installed)}
    library = installed / "fasterase" / "csrc" / f"{cpu.name_variant('DEFAULT')}.so"
    location, choice, loaded = python(_USE, "", cwd=tmp_path, **bare)
    assert Path(location).parent == installed / "fasterase"
    assert choice.startswith("cpu, fp32 products")
    assert Path(loaded) == library
    # Made for a torch that is not this one, by its name or by its contents.
    _, choice = python(_USE, "2.99.0", cwd=tmp_path, **bare)
    assert choice.startswith("chunked")
    library.write_bytes(b"no library")
    _, choice = python(_USE, "", cwd=tmp_path, **bare)
    assert choice.startswith("chunked")
    assert "no C++ compiler" in choice
