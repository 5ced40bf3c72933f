"""The tree: the package list, what is packed, what the wheel holds, and what an import loads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fasterase

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fasterase"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
HEAVY = [
    *("datasets", "deepspeed", "matplotlib", "open_clip", "sklearn", "torchvision"),
    *("transformers", "webdataset"),
]


def python(code: str, *, cwd: Path | None = None, path: Path | str = ROOT) -> str:
    """What a fresh interpreter prints that finds modules in `path`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_public_names_are_light():
    # CPU time, beside that of torch: other work on the machine counts in neither or in both.
    found = python(
        "import sys, time, torch\n"
        "of_torch = time.process_time()\n"
        "import fasterase\n"
        "names = [getattr(fasterase, name) for name in fasterase.__all__]\n"
        "share = (time.process_time() - of_torch) / of_torch\n"
        f"print(share, *[name for name in {HEAVY} if name in sys.modules])"
    ).split()
    assert found[1:] == []
    assert float(found[0]) < 0.6


def test_import_alone_needs_no_torch():
    assert python("import sys, fasterase; print('torch' in sys.modules)").strip() == "False"


def test_contract_names():
    contract = {
        *("unlearn", "UnlearnConfig", "UnlearnResult", "erase_loss", "EraseLoss"),
        *("contrastive", "Contrastive", "evaluate", "Evaluation", "split"),
        *("available_backends", "explain_backend", "FaseraseError"),
    }
    assert contract <= set(fasterase.__all__) <= set(dir(fasterase))
    # fasterase.pairs.split and the like must not shadow the functions of these names.
    assert all(callable(getattr(fasterase, name)) for name in contract)
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        _ = fasterase.forget


def test_deepspeed_is_imported_in_one_folder():
    imported = re.compile(r"^\s*(import|from) deepspeed|import_extra\(.deepspeed", re.MULTILINE)
    users = {path.parent.name for path in MODULES if imported.search(path.read_text())}
    assert users == {"parallel"}


def test_package_list_is_the_tree():
    folders = {path.parent for path in MODULES}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == expected | {"fasterase.kernels", "fasterase.csrc"}
    assert SETUPTOOLS["package-dir"]["fasterase.kernels"] == "kernels"
    assert SETUPTOOLS["package-dir"]["fasterase.csrc"] == "csrc"
    # It would hide the package of that name.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_is_a_drawer():
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in MODULES}


def test_data_files_are_packed():
    packed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))).glob(
            pattern
        )
    }
    files = {
        path
        for folder in (PACKAGE, ROOT / "kernels", ROOT / "csrc")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != "."
    }
    assert files - packed == set()


@pytest.mark.slow
def test_sdist_gives_a_wheel_that_imports_without_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTERASE_WHEEL", "pure")
    tree = tmp_path / "tree"
    for name in ("fasterase", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    copied = {path.relative_to(tree) for path in tree.glob("*/**/*") if path.is_file()}
    expected = {p if p.parts[0] == "fasterase" else "fasterase" / p for p in copied}
    python("import setuptools.build_meta as b; b.build_sdist('..')", cwd=tree, path="")
    (sdist,) = tmp_path.glob("fasterase-*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    python("import setuptools.build_meta as b; b.build_wheel('..')", cwd=unpacked, path="")
    (wheel,) = tmp_path.glob("fasterase-*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, format="zip")

    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert expected <= found
    assert {path.name for path in found if "licenses" in path.parts} >= {"LICENSE"}
    printed = python(
        "import fasterase, fasterase.kernels, importlib.resources as r\n"
        "print(len(fasterase.__path__), (r.files('fasterase.csrc') / 'README.md').is_file())\n"
        "print(fasterase.UnlearnConfig().lr, fasterase.__file__)",
        cwd=tmp_path,
        path=installed,
    )
    assert printed.split() == ["1", "True", "auto", str(installed / "fasterase" / "__init__.py")]


def test_licences_are_declared():
    project = PYPROJECT["project"]
    assert project["license"] == "Apache-2.0 AND MIT AND CC-BY-4.0 AND CC-BY-SA-4.0"
    for pattern in project["license-files"]:
        assert list(ROOT.glob(pattern)), pattern
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
