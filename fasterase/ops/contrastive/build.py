"""The C++ kernels as a shared library: compiled once into torch's extension cache, then loaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import torch

from fasterase.errors import FaseraseError
from fasterase.files import replace_file

# Never -ffast-math: linked in, it turns on flush-to-zero for the whole process. Reassociation would
# break the argument reduction of exp.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


class BuildError(FaseraseError):
    """The kernels cannot be built here; the message is the reason, fit to follow a colon."""


def problem() -> str | None:
    """Build and load the kernels, once a process; the reason where that fails, else None."""
    return _problem()


# torch.compile runs it while tracing and takes its answer for a constant. This is what
# torch.compiler.assume_constant_result does, which would import all of dynamo here.
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _problem() -> str | None:
    try:
        torch.ops.load_library(str(build()))
    except (BuildError, OSError) as error:
        return str(error)
    return None


def build() -> Path:
    """The shared library, compiled if it is not in the cache; any number of processes may ask.

    The cache is `TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`. The library's name holds
    a digest of sources, compiler flags, torch and the CPU's features, so that neither an update nor
    a home folder shared by different machines ever meets another's code.

    Raises:
        BuildError: no compiler, or it failed.
    """
    sources = _sources()
    name = f"fasterase_contrastive_{_digest(sources)}"
    library = _cache() / f"{name}.so"
    if library.exists():
        return library
    _check_tools()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():
                _compile(name, sources, library)
    except OSError as error:
        raise BuildError(f"the cache {library.parent} cannot be written ({error})") from error
    return library


def _compile(name: str, sources: list[Path], library: Path) -> None:
    from torch.utils import cpp_extension

    # A killed build must leave nothing that looks like a library.
    with replace_file(library) as temporary, _ninja_on_path():
        try:
            cpp_extension.load(
                name,
                [str(source) for source in sources if source.suffix == ".cpp"],
                extra_cflags=list(_FLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=str(temporary.parent),
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            lines = str(error).splitlines()
            found = next((line for line in lines if "error:" in line), lines[0])
            raise BuildError(f"compiling the C++ kernels failed ({found.strip()})") from error


def _check_tools() -> None:
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler} is not on PATH); install g++ or set CXX")


def _sources() -> list[Path]:
    paths = (Path(str(entry)) for entry in files("fasterase.csrc").iterdir())
    return sorted(path for path in paths if path.suffix in (".cpp", ".h"))


def _digest(sources: list[Path]) -> str:
    parts = [torch.__version__, *_FLAGS, os.environ.get("CXX", "c++"), _cpu_features()]
    parts += [source.read_text(encoding="utf-8") for source in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """What -march=native goes by."""
    features = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                features.add(line)
    return "\n".join(sorted(features))


def _cache() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(root) if root else Path("~/.cache/torch_extensions").expanduser()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that dies is free again."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch looks for `ninja` on PATH, where an environment that is not activated has none."""
    import ninja

    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before
