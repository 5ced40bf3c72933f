"""Compile csrc/ into a wheel, for the torch it is built with; pyproject.toml has everything else.

A wheel built where torch can be imported (`python -m build --wheel --no-isolation`) has one library
per kind of CPU. Where they cannot be compiled, or with FASTERASE_WHEEL=pure, it has the sources
alone, which are compiled at first use, as they are under any other torch. FASTERASE_WHEEL="AVX2
DEFAULT" compiles only these variants, and fails if it cannot.
"""

import os
import platform
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def configure() -> dict[str, Any]:
    """Arguments of `setup` that compile the libraries."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sys.path.insert(0, str(ROOT))
    from fasterase.ops.contrastive.cpu import FLAGS, VARIANTS, check_compiler, name_variant

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    chosen = os.environ.get("FASTERASE_WHEEL", "").split() or list(VARIANTS)
    for variant in chosen:
        if variant not in VARIANTS:
            raise SystemExit(f"FASTERASE_WHEEL={variant}: choose from pure, {', '.join(VARIANTS)}.")
        own = [VARIANTS[variant]] if is_x86 and VARIANTS[variant] else []
        check_compiler(shlex.split(os.environ.get("CXX", "c++")), [*FLAGS, *own])
    extensions = [
        CppExtension(
            f"fasterase.csrc.{name_variant(variant)}",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            extra_compile_args=[*FLAGS, "-g0", *filter(None, [VARIANTS[variant]])],
            py_limited_api=True,  # no Python in it: one wheel for every version
        )
        for variant in chosen
        if is_x86 or VARIANTS[variant] is None
    ]
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# Only for wheels: an editable install would keep using libraries built from older sources.
wanted = os.environ.get("FASTERASE_WHEEL")
options = {}
if "bdist_wheel" in sys.argv and wanted != "pure" and find_spec("torch"):
    try:
        options = configure()
    except Exception as error:  # no compiler, an old one, a broken torch
        if wanted:
            raise
        print(f"A wheel of sources alone: {error}", file=sys.stderr)
setup(**options)
