"""The tree: the package list, what is packed, and what the wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fasterase"


def _pyproject() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def test_deepspeed_is_imported_in_one_folder():
    imported = re.compile(r"^\s*(import|from) deepspeed|import_extra\(.deepspeed", re.MULTILINE)
    users = {path.parent.name for path in _modules() if imported.search(path.read_text())}
    assert users == {"parallel"}


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
    assert project["license"] == "Apache-2.0 AND MIT AND CC-BY-4.0 AND CC-BY-SA-4.0"
    for pattern in project["license-files"]:
        assert list(ROOT.glob(pattern)), pattern
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_no_file_is_a_drawer():
    drawers = {"utils", "common", "helpers", "misc"}
    assert not [path for path in _modules() if path.stem in drawers]
