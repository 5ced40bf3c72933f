"""The contrastive operator in C++ (csrc/): its torch operators, and how the library is built.

Memory: O(N D) for the gradients, at most `_KEPT_BYTES` of logits between the passes (one such block
is kept for the next call; the system may reclaim its pages meanwhile), and two tiles per thread.
FLOPs, forward and backward: per group 8 n^2 D with the KL where its logits are kept, 12 n^2 D where
they are not (6 and 8 without the KL).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from operator import mul
from pathlib import Path

import torch
from filelock import FileLock

from fasterase.errors import FaseraseError
from fasterase.files import replace_file
from fasterase.ops.contrastive.operator import Batch, Groups, register
from fasterase.progress import say

# Edge of a tile: two fp32 tiles of 512 x 512 (S and S0) are 2 MB.
_TILE = 512
# Logits that the forward pass may keep, so that the backward pass need not compute them again: both
# fp32 matrices of N = 4096. Keeping all takes 8 instead of 12 N^2 D FLOPs with the KL.
_KEPT_BYTES = 128 * 2**20
# Keeping less than this share of the logits would save under a twelfth of the FLOPs.
_LEAST_SHARE = 0.25

# Never -ffast-math: linked in, it turns on flush-to-zero for the whole process. Reassociation would
# break the argument reduction of exp. OpenMP's runtime is the one that torch has loaded.
FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_NATIVE_FLAGS = ("-march=native", *FLAGS)

# What `torch.backends.cpu.get_cpu_capability` may return, and the libraries that a wheel has for
# it, best first. Other processors than x86-64 have the last one.
VARIANTS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3", "DEFAULT": None}


def _choose_options(
    batch: Batch, groups: Groups, is_differentiable: bool, products: str
) -> tuple[int, int, bool]:
    """(edge of a tile, how many logits the forward pass keeps, whether products are in bf16)."""
    is_bf16 = products == "bf16"
    if not is_differentiable:
        return _TILE, 0, is_bf16
    logits = batch.matrices * sum(map(mul, groups, groups))
    kept = min(_KEPT_BYTES // batch.scale.itemsize, logits)
    return _TILE, kept if kept >= _LEAST_SHARE * logits else 0, is_bf16


contrastive_cpu = register(
    "contrastive_cpu",
    {
        "logits": lambda batch, groups, labels, tile, kept, bf16: batch.scale.new_empty(kept),
        "plan": lambda batch, groups, *options: batch.scale.new_empty(
            len(groups), 3, dtype=torch.long
        ),
    },
    in_cpp=True,  # a step leaves out the reference of groups whose KLs have no weight
    options_schema="int tile, SymInt kept, bool bf16",
    options=_choose_options,
)


class BuildError(FaseraseError):
    """The kernels cannot be built here. The message is the reason, worded to follow a colon."""


def load_kernels() -> str | None:
    """Load the kernels, once per process; return the reason if that fails, else None."""
    return _load_kernels()


# torch.compile calls it while tracing and takes its answer for a constant. This is what
# torch.compiler.assume_constant_result does, which would import all of dynamo here.
load_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def multiplies_bf16() -> bool:
    """Whether this CPU has AMX, and torch its kernels for it; after `load_kernels`."""
    return bool(torch.ops.fasterase.has_amx())


multiplies_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _load_kernels() -> str | None:
    try:
        load_library()
    except (BuildError, OSError) as error:
        return str(error)
    return None


@functools.cache
def load_library() -> Path:
    """Load the kernels: those of the wheel if it has some for this torch, else built ones.

    Raises:
        BuildError: there are none, and they cannot be built.
        OSError: those built cannot be loaded.
    """
    for library in _find_shipped():
        with contextlib.suppress(OSError):  # of another system's libraries: build them
            _load_library(library)
            return library
    library = build_library()
    try:
        _load_library(library)
    except OSError:  # damaged, or made for another system's libraries: once more
        library.unlink(missing_ok=True)  # another rank may have been first
        library = build_library()
        _load_library(library)
    return library


def name_variant(variant: str) -> str:
    """The stem of a wheel's library. torch keeps its C++ interface within a minor version."""
    return f"contrastive_torch{'_'.join(torch.__version__.split('.')[:2])}_{variant}"


def _find_shipped() -> list[Path]:
    """The libraries of an installed wheel that this torch and this CPU can run, best first."""
    variants = list(VARIANTS)
    capability = torch.backends.cpu.get_cpu_capability()
    usable = variants[variants.index(capability) if capability in variants else -1 :]
    found = {entry.name: Path(str(entry)) for entry in files("fasterase.csrc").iterdir()}
    names = (f"{name_variant(variant)}.so" for variant in usable)
    return [found[name] for name in names if name in found]


def _load_library(library: Path) -> None:
    """Load it; a truncated one raises here, where reading past its end would kill the process."""
    header = library.read_bytes()[:64]
    if header[:5] == b"\x7fELF\2" and len(header) == 64:
        sections, each, count = struct.unpack_from("=Q10xHH", header, 40)  # which end the file
        if library.stat().st_size < sections + each * count:
            raise OSError(f"{library} is truncated")
    torch.ops.load_library(str(library))


def build_library() -> Path:
    """The shared library, compiled if it is not in the cache; any number of processes may ask.

    The cache is `TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`. The library's name has
    digests of all that it depends on, the compiler last: neither an update nor a home folder shared
    by different machines can load the wrong code. Without a compiler, that of any one will do.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be written.
    """
    paths = (Path(str(entry)) for entry in files("fasterase.csrc").iterdir())
    sources = sorted(path for path in paths if path.suffix in (".cpp", ".h"))
    texts = [source.read_text(encoding="utf-8") for source in sources]
    system = (torch.__version__, *platform.libc_ver(), _read_cpu_features())
    stem = f"fasterase_contrastive_{_compute_digest(*_NATIVE_FLAGS, *system, *texts)}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    cache = Path(root).expanduser()
    wanted = os.environ.get("CXX", "c++")
    compiler = shutil.which(wanted)
    if compiler is None:
        built = sorted(cache.glob(f"{stem}_*.so"), key=os.path.getmtime)
        if built:
            return built[-1]
        raise BuildError(f"no C++ compiler ({wanted} is not on PATH); install g++ or set CXX")
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    name = f"{stem}_{_compute_digest(compiler, asked.stdout)}"
    library = cache / f"{name}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                check_compiler([compiler], _NATIVE_FLAGS)
                _compile_library(name, sources, library)
    except OSError as error:
        raise BuildError(f"the cache {cache} cannot be written ({error})") from error
    return library


def check_compiler(compiler: Sequence[str], flags: Sequence[str]) -> None:
    """Raise `BuildError` if it refuses the flags or has no OpenMP, before a minute is lost."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads(); }\n"
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", "-"]
    tried = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if tried.returncode:
        said = next((line for line in tried.stderr.splitlines() if "error" in line), "no reason")
        raise BuildError(
            f"{shlex.join(compiler)} cannot compile them ({said.strip()}); set CXX to g++, or to a "
            f"clang with OpenMP (Apple's has none)"
        )


def _compile_library(name: str, sources: list[Path], library: Path) -> None:
    from torch.utils import cpp_extension

    say("compiling the C++ kernels of the loss, once for this torch and CPU: about a minute")
    # A killed build must leave nothing that looks like a library.
    with replace_file(library) as temporary, _add_ninja_to_path():
        try:
            cpp_extension.load(
                name,
                [str(source) for source in sources if source.suffix == ".cpp"],
                extra_cflags=list(_NATIVE_FLAGS),
                build_directory=str(temporary.parent),
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            lines = str(error).splitlines()
            message = next((line for line in lines if "error:" in line), lines[0])
            raise BuildError(f"compiling the C++ kernels failed ({message.strip()})") from error


def _compute_digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _read_cpu_features() -> str:
    """The description of the CPU that the result of -march=native depends on."""
    features = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                features.add(line)
    return "\n".join(sorted(features))


@contextlib.contextmanager
def _add_ninja_to_path() -> Iterator[None]:
    """Let torch find `ninja`, which is not on PATH in an environment that is not activated."""
    import ninja

    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before
