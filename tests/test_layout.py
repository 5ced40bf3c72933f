"""The tree: package list, what is packed, one direction of imports, and the size of files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fasterase

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fasterase"

# Each part may import itself and what stands before it.
ORDER = [
    "errors",
    "option_values",
    "config",
    "files",
    "seeds",
    "progress",
    "kernels",
    "csrc",
    "ops",
    "losses",
    "objective",
    "models",
    "parallel",
    "pairs",
    "encode",
    "original",
    "evaluation",
    "report",
    "engine",
    "planner",
    "provenance",
    "result",
    "api",
    "demo",
    "cli",
    "__main__",
]


def _pyproject() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports from fasterase, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "fasterase")


def _imported_part(name: str) -> str:
    """The part of the package that a dotted name belongs to; public names belong to their home."""
    first = name.split(".")[1]
    home = fasterase._HOME.get(first)
    return home.split(".")[1] if home else first


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = _part(path)
    if part == "__init__":
        return
    allowed = ORDER[: ORDER.index(part) + 1]
    for name in _imported(path):
        if name in ("fasterase", "fasterase.__version__"):
            continue
        assert _imported_part(name) in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_deepspeed_is_imported_in_one_folder():
    imported = re.compile(r"^\s*(import|from) deepspeed|import_extra\(.deepspeed", re.MULTILINE)
    users = {path.parent.name for path in _modules() if imported.search(path.read_text())}
    assert users == {"parallel"}


def test_a_back_edge_would_be_found(tmp_path):
    file = tmp_path / "ops.py"
    file.write_text("def f():\n    from fasterase.engine import loop\n    import fasterase.api\n")
    assert list(_imported(file)) == ["fasterase.engine.loop", "fasterase.api"]
    assert _imported_part("fasterase.engine.loop") == "engine"
    assert _imported_part("fasterase.unlearn") == "api"
    assert ORDER.index("engine") > ORDER.index("ops")


def test_every_part_has_a_place_in_the_order():
    parts = {_part(path) for path in _modules()} - {"__init__"}
    assert parts <= set(ORDER)


def test_package_list_is_the_tree():
    folders = {path.parent for path in _modules()}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    setuptools = _pyproject()["tool"]["setuptools"]
    assert set(setuptools["packages"]) == expected | {"fasterase.kernels", "fasterase.csrc"}
    assert setuptools["package-dir"]["fasterase.kernels"] == "kernels"
    assert setuptools["package-dir"]["fasterase.csrc"] == "csrc"


def test_every_folder_of_modules_is_a_package():
    for path in _modules():
        assert (path.parent / "__init__.py").is_file(), path.parent


def test_kernels_folder_does_not_hide_the_package_of_that_name():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_data_files_are_packed():
    setuptools = _pyproject()["tool"]["setuptools"]
    packed = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in _folder(package, setuptools["package-dir"]).glob(pattern)
    }
    folders = (PACKAGE, ROOT / "kernels", ROOT / "csrc")
    data = {path for folder in folders for path in folder.rglob("*") if _is_data(path)}
    assert data - packed == set()


def _folder(package: str, renamed: dict[str, str]) -> Path:
    return ROOT / renamed.get(package, package.replace(".", "/"))


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")


@pytest.mark.slow
def test_sdist_gives_a_wheel_that_imports_without_the_checkout(tmp_path):
    tree = tmp_path / "tree"
    for name in ("fasterase", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    expected = {
        _installed(path.relative_to(tree)) for path in tree.glob("*/**/*") if path.is_file()
    }
    _python("import setuptools.build_meta as b; b.build_sdist('..')", cwd=tree)
    (sdist,) = tmp_path.glob("fasterase-*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    _python("import setuptools.build_meta as b; b.build_wheel('..')", cwd=unpacked)
    (wheel,) = tmp_path.glob("fasterase-*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, format="zip")

    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert expected <= found
    assert {path.name for path in found if "licenses" in path.parts} >= {"LICENSE"}
    printed = _python(
        "import fasterase, fasterase.kernels, importlib.resources as r\n"
        "print(len(fasterase.__path__), (r.files('fasterase.csrc') / 'README.md').is_file())\n"
        "print(fasterase.UnlearnConfig().lr, fasterase.__file__)",
        cwd=tmp_path,
        path=installed,
    )
    assert printed.split() == ["1", "True", "auto", str(installed / "fasterase" / "__init__.py")]


def _installed(path: Path) -> Path:
    return path if path.parts[0] == "fasterase" else "fasterase" / path


def _python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_licences_are_declared():
    project = _pyproject()["project"]
    assert project["license"] == "Apache-2.0 AND MIT AND CC-BY-4.0"
    for pattern in project["license-files"]:
        assert list(ROOT.glob(pattern)), pattern
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_named_after_one_job(path):
    assert path.stem not in ("utils", "common", "helpers", "misc")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
