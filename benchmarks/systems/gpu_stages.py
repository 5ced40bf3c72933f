"""All that is to be done on a machine with a GPU, in stages of at most eight minutes.

    make gpu                 every stage that is not done yet: 40 minutes at most
    make gpu STAGE=tests     one stage, done or not
    make gpu WHEELS=folder   with the wheels of a folder; nothing needs the network
    make gpu DRY=1           every stage at tiny sizes on a CPU, to try this out

A stage ends at its planned time, or after --seconds, and has then kept what it measured: the same
command continues. Results, at most eight files, go to --results: among them gpu_stages.json, which
stage is done for which version and GPU, and gpu_log.txt, what the stages said. Where a machine
keeps nothing, put the files that came back into --results, and the next command goes on from them.
Wheels and compiled kernels go to --work. Without git, FASTERASE_COMMIT names the commit.

A stage that needs a GPU, compute-sanitizer or measurements, and lacks them, says so and counts as
skipped. The exit code is 0 if every stage is done or skipped, 1 if one failed, 75 if one is
unfinished.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import exit_with, new_parser
from benchmarks.result_files import RESULTS, code_version, device_name
from fasterase.errors import InputError
from fasterase.files import write_text

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gpu"
UNFINISHED = 75
# A command on a lent machine may take ten minutes, starting and copying included.
LONGEST_SECONDS = 480

_TESTS = (
    "tests/ops/test_contrastive_triton_gpu.py",
    "tests/ops/test_contrastive_triton_gpu_context.py",
)
_PEER_PACKAGES = ("open_clip", "liger_kernel", "memeff", "siglip_kernel", "deepspeed")
_OWN = ("fasterase-triton", "fasterase-chunked")
_PEERS = ("torch-dense", "open_clip", "liger", "memeff", "siglip-kernel")


class Context(NamedTuple):
    """Where a stage works, and how."""

    results: Path
    work: Path
    is_dry: bool = False  # tiny sizes, on a CPU
    passed: tuple[str, ...] = ()  # tests that passed before the time ran out


Commands = Callable[[Context], "list[list[str]] | str"]


@dataclass(frozen=True)
class Stage:
    """One stage."""

    about: str  # what it does
    seconds: int  # planned, after which it is ended
    commands: Commands  # its commands, or why it has none
    needs_gpu: bool = True  # without one it is skipped
    is_extra: bool = False  # it runs only when it is named


def _python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _check(mode: str, *, module: str = "gpu_checks", file: str = "") -> Commands:
    """Return the commands of a mode of a module beside this one, which writes a result file."""

    def commands(context: Context) -> list[list[str]]:
        output = ("--output", context.results / file) if file else ()
        return [_python(f"benchmarks.systems.{module}", mode, *output)]

    return commands


def _tests(context: Context) -> list[list[str]]:
    parallel = ("-n", "4") if find_spec("xdist") and not context.is_dry else ()
    skips = [f"--deselect={name}" for name in context.passed]
    return [_python("pytest", "-v", "-rs", "-p", "no:cacheprovider", *parallel, *_TESTS, *skips)]


def _sanitizer(tool: str) -> Commands:
    def commands(context: Context) -> list[list[str]] | str:
        program = _python("benchmarks.systems.gpu_checks", "small")
        found = shutil.which("compute-sanitizer")
        if found is None and not context.is_dry:
            return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
        options = [str(found), "--tool", tool, "--error-exitcode", "9"]
        return [program if context.is_dry else [*options, *program]]

    return commands


def _loss(*options: object, dtype: str = "bfloat16", providers: tuple[str, ...] = ()) -> Commands:
    """Return the commands of a comparison of losses; all of them share a file."""

    def commands(context: Context) -> list[list[str]]:
        where: tuple[object, ...] = ("--device", "cuda", "--dtypes", dtype, *options)
        if context.is_dry:
            where = ("--device", "cpu", "--dtypes", "float32", *options)
            where += ("--sizes", 24, "--error-size", 24, "--widths", 16, "--seconds", 0)
            where += ("--min-samples", 1, "--max-samples", 1)
        names = providers or (*_OWN, *_PEERS)
        output = context.results / "contrastive_cuda.csv"
        return [_python("benchmarks.loss", *where, "--providers", *names, "--output", output)]

    return commands


def _speed(dtype: str, *sizes: int) -> Commands:
    metrics = ("--metrics", "speed", "memory", "--labels", "without", "--seconds", 0.2)
    return _loss(*metrics, "--widths", 768, 512, 1280, "--sizes", *sizes, dtype=dtype)


def _end_to_end(context: Context) -> list[list[str]]:
    options = ("--device", "cuda", "--output", context.results / "end_to_end.csv")
    return [_python("benchmarks.systems.end_to_end", *options)]


def _cost_model(context: Context) -> list[list[str]] | str:
    file = context.results / "contrastive_cuda.csv"
    if context.is_dry or not file.is_file():
        return f"no measurements of a GPU: {file} comes from the stage speed"
    return [_python("benchmarks.loss.gpu_model", "--against", file)]


_ERRORS = ("--metrics", "error", "--error-size", 1024, 4096, 16384, 65536, "--widths", 768)
_COMPILED = ("--metrics", "speed", "--labels", "without", "--sizes", 4096, 16384, "--widths", 768)
_SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# In the order of their value: whatever is left undone is worth less than what was done.
STAGES = {
    "warm": Stage("compile the kernels, 16 at a time", 150, _check("warm", module="gpu_kernels")),
    "tests": Stage("the tests that need a GPU", 300, _tests),
    "small": Stage("one small call of each kind", 40, _check("small")),
    "errors": Stage("errors against fp64, up to 65,536 pairs", 150, _loss(*_ERRORS)),
    "speed": Stage("bf16 losses against every peer", 420, _speed("bfloat16", *_SIZES)),
    "kernels": Stage(
        "time of each kernel",
        60,
        _check("kernels", module="gpu_kernels", file="gpu_kernels.csv"),
    ),
    "tiles": Stage(
        "the fastest tile of each kernel",
        300,
        _check("tiles", module="gpu_tiles", file="gpu_tiles.json"),
    ),
    "graphs": Stage("steps replayed as CUDA graphs", 60, _check("graphs", file="gpu_checks.csv")),
    "erasures": Stage(
        "unlearn against the plan's memory and time",
        360,
        _check("plan", module="gpu_erasures", file="gpu_erasures.csv"),
    ),
    "ranks": Stage(
        "NCCL and DeepSpeed on one rank",
        150,
        _check("ranks", module="gpu_erasures", file="gpu_erasures.csv"),
    ),
    "repeats": Stage("the same bits every time", 60, _check("repeats", file="gpu_checks.csv")),
    "model": Stage("the cost model against the measurements", 20, _cost_model, needs_gpu=False),
    "memcheck": Stage("compute-sanitizer: accesses out of bounds", 120, _sanitizer("memcheck")),
    "racecheck": Stage("compute-sanitizer: races in shared memory", 150, _sanitizer("racecheck")),
    "speed-fp16": Stage("fp16 losses", 420, _speed("float16", *_SIZES), is_extra=True),
    "speed-fp32": Stage("fp32 losses", 420, _speed("float32", *_SIZES[:6]), is_extra=True),
    "compiled": Stage(
        "against compiled open_clip",
        420,
        _loss(*_COMPILED, providers=("fasterase-triton", "torch-dense", "open_clip-compiled")),
        is_extra=True,
    ),
    "end-to-end": Stage("unlearn against a plain loop", 480, _end_to_end, is_extra=True),
}


def run_stage(name: str, context: Context, *, seconds: float | None, again: bool) -> str:
    """Run one stage, and return "done", "skipped", "unfinished" or "failed"."""
    stage, notes = STAGES[name], context.results / "gpu_stages.json"
    on_gpu = has_gpu() and not context.is_dry
    print(f"== {name}: {stage.about}", flush=True)
    if stage.needs_gpu and not on_gpu and not context.is_dry:
        print("skipped: it needs a CUDA GPU; --dry-run tries it on a CPU")
        return "skipped"
    here = {"version": code_version(), "device": device_name("cuda" if on_gpu else "cpu")}
    known: dict[str, Any] = json.loads(notes.read_text("utf-8")) if notes.is_file() else {}
    earlier = known.get(name, {})
    is_same = all(earlier.get(key) == value for key, value in here.items())
    if is_same and earlier.get("state") == "done" and not again:
        print("done before; name the stage to run it again")
        return "done"
    is_continued = is_same and earlier.get("state") == "unfinished"
    passed = earlier.get("passed", []) if is_continued else []
    commands = stage.commands(context._replace(passed=tuple(passed)))
    if isinstance(commands, str):
        print(f"skipped: {commands}")
        return "skipped"
    started, state = time.monotonic(), "done"
    limit = stage.seconds if seconds is None else seconds
    log = context.results / "gpu_log.txt"
    for command in commands:
        left = limit - (time.monotonic() - started)
        code, said = run_command(command, log, seconds=left, context=context)
        passed += _passed_tests(said)
        state = "unfinished" if code is None else "failed" if code else state
        if state != "done":
            break
    took = time.monotonic() - started
    note = {**here, "state": state, "seconds": round(took, 1), "planned": stage.seconds}
    known[name] = note | ({"passed": passed} if state == "unfinished" and passed else {})
    write_text(notes, json.dumps(known, indent=1) + "\n")
    advice = {"unfinished": "; run it again to continue", "failed": f"; see {log}"}
    print(f"{state} after {took:.0f} s of {limit:g}{advice.get(state, '')}", flush=True)
    return state


def _passed_tests(said: str) -> list[str]:
    """Return the tests that pytest, or a worker of xdist, has said to have passed."""
    alone = re.findall(r"^(tests/\S+::.+?) PASSED", said, re.MULTILINE)
    return alone + re.findall(r"^\[gw\d+\] .*?PASSED (tests/\S+::.+?) *$", said, re.MULTILINE)


def run_command(
    command: list[str], log: Path, *, seconds: float, context: Context
) -> tuple[int | None, str]:
    """Run a command, its output on the terminal and in `log`.

    Return its code, None if it was ended after so many seconds, and what it said.
    """
    said: list[bytes] = [f"\n$ {' '.join(command)}\n".encode()]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("ab") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(command, context),
        ) as child,
    ):
        file.write(said[0])
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        deadline = time.monotonic() + seconds
        is_late = False
        while True:
            code = child.poll()
            text = child.stdout.read() or b""
            said.append(text)
            file.write(text)
            file.flush()
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
            if code is not None:
                return (None if is_late else code), b"".join(said).decode(errors="replace")
            if time.monotonic() > deadline:
                # Benchmarks have written all finished cells by then; children of theirs end too.
                os.killpg(child.pid, signal.SIGKILL)
                is_late = True
            time.sleep(0.1)


def _environment(command: list[str], context: Context) -> dict[str, str]:
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found["TRITON_CACHE_DIR"] = str(context.work / "triton")
    paths = [str(context.work / "packages"), os.environ.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if context.is_dry:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if "memcheck" in command:
        # Without the pools of torch's allocator it sees each tensor's own bounds.
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def install(wheels: Path, work: Path) -> None:
    """Install every wheel of a folder for the stages, without the network or their dependencies."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise InputError(f"WHEELS: no *.whl in {wheels}. `make gpu-wheels` fetches them.")
    packages = work / "packages"
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade")
    command = _python("pip", "install", *options, "--target", packages, *found)
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)


def has_gpu() -> bool:
    """Tell whether torch sees a GPU."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{sys.executable} cannot import torch ({error}). Install what the stages need with "
            f"`{sys.executable} -m pip install -e '.[dev]'`, or name a Python that has it: "
            "make gpu PYTHON=/path/to/python."
        ) from error
    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, prog="python -m benchmarks.systems.gpu_stages")
    parser.add_argument("--stage", choices=list(STAGES), help="only this one, done or not")
    parser.add_argument("--seconds", type=float, help="limit of a stage; default: as planned")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results; dry: in --work")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args(argv)
    results = args.results or (args.work / "dry" if args.dry_run else RESULTS)
    context = Context(results.resolve(), args.work.resolve(), args.dry_run)
    if args.wheels is not None:
        install(args.wheels, context.work)
    sys.path.insert(0, str(context.work / "packages"))
    on_gpu = has_gpu() and not args.dry_run
    peers = ", ".join(name for name in _PEER_PACKAGES if find_spec(name)) or "none"
    print(
        f"{device_name('cuda') if on_gpu else 'no CUDA GPU'}; torch {version('torch')}; "
        f"fasterase {code_version()}; installed: {peers}"
    )
    asked = [args.stage] if args.stage else [name for name in STAGES if not STAGES[name].is_extra]
    states = {
        name: run_stage(name, context, seconds=args.seconds, again=args.stage is not None)
        for name in asked
    }
    print("\n" + "\n".join(f"{name:12} {state}" for name, state in states.items()))
    if "failed" in states.values():
        return 1
    return UNFINISHED if "unfinished" in states.values() else 0


if __name__ == "__main__":
    exit_with(main)
