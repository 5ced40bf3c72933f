"""Compile csrc/ into a wheel, for the torch that it is built with; pyproject.toml has all else.

A wheel built where torch can be imported (`python -m build --wheel --no-isolation`) has one library
per kind of CPU. Without torch, or with FASTERASE_WHEEL=pure, it has the sources alone, which are
compiled at first use, as they are under any other torch. FASTERASE_WHEEL="AVX2 DEFAULT" compiles
only these variants.
"""

import os
import platform
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

    check_compiler(os.environ.get("CXX", "c++"), FLAGS)
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    chosen = os.environ.get("FASTERASE_WHEEL", "").split() or list(VARIANTS)
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


# Only for wheels: an editable install would go on with the libraries of older sources.
is_compiled = "bdist_wheel" in sys.argv and os.environ.get("FASTERASE_WHEEL") != "pure"
setup(**(configure() if is_compiled and find_spec("torch") else {}))
