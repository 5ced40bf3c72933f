"""Compile every Triton kernel without a GPU, and tabulate its resources and instructions.

    python -m benchmarks.loss.gpu_model.compiled_kernels

A call on CPU tensors has its launches recorded: exactly what it would launch is compiled, for
sm_80, sm_89, sm_90, sm_100, sm_120 and gfx942 (an AMD MI300). The command prints a table
and writes `benchmarks/results/compiled_kernels.csv`: registers per thread, bytes of stack (spills),
shared memory, and the instruction mix in the loop over the features' depth and in the whole kernel.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.command import exit_with, new_parser
from benchmarks.loss.gpu_model.instructions import count_amd, count_nvidia
from benchmarks.result_files import RESULTS, write_csv
from fasterase.errors import InputError
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive import triton_plan
from fasterase.ops.contrastive.checks import resolve_products
from fasterase.ops.contrastive.operator import Batch, Wanted
from fasterase.ops.contrastive.triton_launch import FIXED_OPTIONS, Launcher

# Bytes of shared memory available to one block, by architecture.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """A kernel and the arguments of one call."""

    kernel: Any
    case: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    handle: tuple[Any, ...]  # under which the launcher finds it

    @property
    def name(self) -> str:
        variants = {"IS_ONLINE": "_online", "HAS_CROSS": "_with_crosses"}
        name = self.kernel.fn.__name__
        if name == "gradient_strip":
            name += "".join(x for key, x in variants.items() if self.arguments[key])
        return name

    @property
    def tile(self) -> str:
        sizes = (self.arguments.get(f"BLOCK_{axis}") for axis in "MNK")
        return "x".join(str(size) for size in sizes if size is not None)


def launches(
    dtype: torch.dtype, width: int, ref_width: int | None, target: str, products: str | None = None
) -> list[Launch]:
    """Record every launch of forward, backward and a step with known weights, at N = 4096.

    products: as `resolve_products` returns them; None multiplies features of `dtype` as they are.
    """
    n = 4096
    architecture = target if target.startswith("sm_") else "gfx"
    case = f"{str(dtype).removeprefix('torch.')}{f' as {products}' if products else ''} D={width}"
    case += "" if ref_width is None else f" D0={ref_width}"
    image = torch.zeros(n, width, dtype=dtype)
    ref = None if ref_width is None else torch.zeros(n, ref_width, dtype=dtype)
    scale = torch.ones(())
    batch = Batch(image, image, scale, ref, ref, None if ref is None else scale)
    products = products or resolve_products("auto", "triton", (image, image))
    with on_gpu(architecture), recorded(case) as found:
        losses, *saved = triton_backend.forward(batch, (n,), products)
        wanted = Wanted(image=True, text=True, scale=True, rounded=False)
        triton_backend.backward(losses, batch, tuple(saved), (n,), wanted, products)
        triton_backend.step(losses, batch, (n,), wanted, products)
    return list({launch.name: launch for launch in found}.values())


@contextlib.contextmanager
def recorded(case: str = "") -> Iterator[list[Launch]]:
    """Note launches in the place of launching."""
    found: list[Launch] = []

    def record(launcher: Any, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        variant = constants.pop("variant", 0)
        names = ("num_warps", "num_stages")
        options = {name: constants.pop(name) for name in names if name in constants}
        handle = id(launcher.handles), id(kernel), variant, *constants.values(), *options.values()
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        found.append(Launch(kernel, case, arguments, options | FIXED_OPTIONS, handle))

    with mock.patch.object(Launcher, "__call__", record):
        yield found


def _multiply_nothing(left: Any, right: Any, out: Any, *, beta: int) -> None:
    """In the place of cuBLAS."""


@contextlib.contextmanager
def on_gpu(architecture: str) -> Iterator[None]:
    """Plan launches of CPU tensors as for a GPU of 132 multiprocessors, without cuBLAS's part."""
    triton_plan.plan_kernel.cache_clear()
    try:
        with (
            mock.patch.dict(vars(triton_plan), _architecture=lambda device: architecture),
            mock.patch.dict(vars(triton_backend), _num_multiprocessors=lambda device: 132),
            mock.patch.object(triton_backend, "_multiply", new=_multiply_nothing),
        ):
            yield
    finally:
        triton_plan.plan_kernel.cache_clear()


def specialise(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return the signature, constants and attributes that `JITFunction` would compile for."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for k, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        is_multiple = False
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            is_multiple = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[(k,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            is_multiple = value % 16 == 0
        if is_multiple and not parameter.do_not_specialize:
            attributes[(k,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def build(launch: Launch, target: str) -> Any:
    """Compile a launch; the result has `.asm["cubin"]` or `.asm["amdgcn"]`, and `.metadata`."""
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    return triton.compile(
        ASTSource(launch.kernel, *specialise(launch)), target=gpu, options=launch.options
    )


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile a launch; return its row of the table: resources and numbers of instructions."""
    compiled = build(launch, target)
    if "cubin" in compiled.asm:
        registers, stack = resources(compiled.asm["cubin"])
        counts = count_nvidia(tool("cuobjdump", "--dump-sass", cubin=compiled.asm["cubin"]))
    else:
        assembly = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"\.{name}: +(\d+)", assembly)[-1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        counts = count_amd(assembly)
    row: dict[str, Any] = {"kernel": launch.name, "case": launch.case, "target": target}
    row |= {"tile": launch.tile, "warps": compiled.metadata.num_warps}
    row["stages"] = compiled.metadata.num_stages
    row |= {"registers": registers, "stack_bytes": stack, "shared_bytes": compiled.metadata.shared}
    return {**row, "wgmma": "wgmma" in compiled.asm.get("ptx", ""), **counts}


def tool_path(name: str) -> str:
    """Return the path of a CUDA binary tool that Triton ships with."""
    return str(_BIN / name)


def tool(name: str, *flags: str, cubin: bytes) -> str:
    """Run one of Triton's CUDA binary tools on a cubin and return its output."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool_path(name), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers per thread and the bytes of stack."""
    usage = tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def cases(target: str) -> Iterator[Launch]:
    """Yield every launch to compile for a target.

    Kernels that multiply features come in every variant: widths that BLOCK_K divides and does not,
    with and without reference, bf16, fp32, and fp32 rounded as `unlearn` and `ClipLoss` under
    autocast do. The others only stream and come once.
    """
    seen: set[str] = set()
    for dtype, width, ref_width, products in (
        (torch.bfloat16, 768, 768, None),
        (torch.bfloat16, 768, None, None),
        (torch.bfloat16, 1280, 500, None),
        (torch.bfloat16, 500, None, None),
        (torch.float32, 768, 768, "fp16"),
        (torch.float32, 768, None, "fp16"),
        (torch.float32, 768, None, "bf16"),
        (torch.float32, 512, 512, None),
        (torch.float32, 512, None, None),
    ):
        for launch in launches(dtype, width, ref_width, target, products):
            if "PRECISION" in launch.arguments:
                yield launch
            elif launch.name not in seen:
                seen.add(launch.name)
                yield launch


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--kernel", help="compile only this kernel")
    parser.add_argument("--target", choices=list(SHARED_LIMIT), help="compile only for this target")
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled_kernels.csv")
    args = parser.parse_args(argv)
    if triton_plan.INTERPRETED:
        raise InputError("TRITON_INTERPRET is set: kernels do not compile under the interpreter.")
    rows: list[dict[str, Any]] = []
    for target in SHARED_LIMIT if args.target is None else (args.target,):
        for launch in cases(target):
            if args.kernel not in (None, launch.name):
                continue
            row = compile_launch(launch, target)
            rows.append(row)
            counts = {name: n for name, n in row.items() if name.startswith("loop_") and n}
            mix = " ".join(f"{name.removeprefix('loop_')} {n}" for name, n in counts.items())
            print(
                "{kernel:34} {case:24} {target:6} {tile:12} {warps} warps {registers:4} registers "
                "{stack_bytes:4} B stack {shared_bytes:7} B shared".format(**row),
                f"{'wgmma' if row['wgmma'] else '     '} loop: {mix}",
                flush=True,
            )
    if not rows:
        raise InputError(f"--kernel: there is no kernel {args.kernel!r}.")
    write_csv(args.output, rows)


if __name__ == "__main__":
    exit_with(main)
