"""Fetch the wheels that a bare machine with a GPU lacks, for `make gpu WHEELS=folder`.

    python -m benchmarks.systems.gpu_wheels wheels

The machine is taken to have Linux on x86-64, Python 3.12, and CUDA builds of torch and Triton with
transformers, timm, pytest, hypothesis and what these need. Wheels are fetched without what they
depend on, by pip, from the index that it is set up for, in versions that pyproject.toml allows;
DeepSpeed, which is only published as a source archive, is built into a wheel. New wheels replace
those of other versions. With the files of the project they may take 60 MB, so bitsandbytes (43 MB)
stays behind; --also names others that fit.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

from benchmarks.command import exit_with, new_parser
from fasterase.errors import InputError
from fasterase.numerals import counted

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 60_000_000
PYTHON = "3.12"
# Of fasterase itself, of DeepSpeed, and the losses that are compared.
PACKAGES = (
    *("open_clip_torch", "ftfy", "wcwidth", "webdataset", "braceexpand", "hjson"),
    *("liger-kernel", "memeff", "siglip-kernel"),
)
# With what it needs, since each version takes exactly one of its core.
WITH_DEPENDENCIES = ("pydantic",)
# Source archives on the index, which need no compiler.
SOURCES = ("deepspeed",)
_PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def fetch(folder: Path, also: list[str]) -> None:
    """Download the wheels that run on the machine with the GPU; build those of source archives.

    They replace those of the same packages in the folder.
    """
    bounded = {re.split(r"[^\w.-]", each)[0]: each for each in requires("fasterase") or ()}
    packages, sources = (
        [bounded.get(name, name).split(";")[0].strip() for name in names]
        for names in (PACKAGES, SOURCES)
    )
    wanted = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    wanted += [f"--platform={name}_x86_64" for name in _PLATFORMS]
    with tempfile.TemporaryDirectory(dir=folder) as fetched:
        _pip("download", "--no-deps", *wanted, "--dest", fetched, *packages, *also)
        _pip("download", *wanted, "--dest", fetched, *WITH_DEPENDENCIES)
        # With the torch that is here: its setup asks for one.
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", fetched, *sources)
        for wheel in Path(fetched).glob("*.whl"):
            for other in folder.glob(f"{wheel.name.split('-')[0]}-*.whl"):
                other.unlink()
            wheel.replace(folder / wheel.name)


def _pip(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments]).returncode
    if code:
        raise InputError(
            f"pip {arguments[0]} ended with code {code}; what it said is above. Wheels come from "
            "the index that pip is set up for (PIP_INDEX_URL)."
        )


def project_bytes() -> int:
    """Return the size of the project's files, as git knows them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


def check_sizes(wheels: Path, project: int) -> str:
    """Return what all of it takes.

    Raises:
        InputError: it is more than `LIMIT_BYTES`; names the largest wheels.
    """
    sizes = {file.name: file.stat().st_size for file in wheels.glob("*.whl")}
    total = project + sum(sizes.values())
    said = f"{counted(len(sizes), 'wheel')} of {(total - project) / 1e6:.1f} MB, and "
    said += f"{project / 1e6:.1f} MB of the project"
    if total > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise InputError(
            f"{said}: more than {LIMIT_BYTES / 1e6:.0f} MB in all. The largest: {named}. Remove "
            f"some from {wheels}."
        )
    return said


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__, prog="python -m benchmarks.systems.gpu_wheels")
    parser.add_argument("wheels", type=Path, help="folder to put them in")
    parser.add_argument("--also", nargs="+", default=[], metavar="PACKAGE")
    args = parser.parse_args(argv)
    args.wheels.mkdir(parents=True, exist_ok=True)
    fetch(args.wheels, args.also)
    print(f"{check_sizes(args.wheels, project_bytes())}, in {args.wheels}")


if __name__ == "__main__":
    exit_with(main)
