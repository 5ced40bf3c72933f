"""Everything that needs a GPU, in stages of at most eight minutes.

    make gpu                       every stage that is not done yet: 40 minutes at most
    make gpu STAGE="tests small"   these stages; what is done is measured again
    make gpu ARGS="--total 540"    what fits into nine minutes
    make gpu WHEELS=folder         with the wheels of a folder; nothing needs the network
    make gpu DRY=1                 every stage at tiny sizes on a CPU, to try this out

A stage ends at its planned time, or after --seconds, and has then kept each row that it measured:
the same command continues. With --total, stages end when that time is over, and none starts in its
last 30 seconds. A failed stage runs again when it is named, or for another version or GPU; named,
it leaves out what passed. Results, at most eight files, go to --results: among them
gpu_stages.json, which stage is done for which version and GPU, and gpu_log.txt, what the stages
said. Where a machine keeps nothing, put the files that came back into --results, and the next
command goes on from them. Wheels and compiled kernels go to --work. Without git, FASTERASE_COMMIT
names the commit.

A stage that needs a GPU, compute-sanitizer or measurements, and lacks them, says so and counts as
skipped. The exit code is 0 if every stage is done or skipped, 1 if one failed, 75 if one is
unfinished.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.command import exit_with, new_parser
from benchmarks.result_files import RESULTS, code_version, device_name
from fasterase.errors import InputError
from fasterase.files import remove_leftovers, write_text

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gpu"
UNFINISHED = 75
# Where commands are limited to ten minutes, starting and copying included.
LONGEST_SECONDS = 480
# What is left of --total in which no stage starts: importing torch takes as long.
_LEAST_SECONDS = 30

_TESTS = ("tests/ops/test_contrastive_triton_gpu.py",)
_PEER_PACKAGES = ("open_clip", "liger_kernel", "memeff", "siglip_kernel", "deepspeed")
_OWN = ("fasterase-triton", "fasterase-chunked")
_PEERS = ("torch-dense", "open_clip", "liger", "memeff", "siglip-kernel")


class Context(NamedTuple):
    """Where a stage works, and how."""

    results: Path
    work: Path
    is_dry: bool = False  # tiny sizes, on a CPU
    passed: tuple[str, ...] = ()  # tests that passed before the time ran out, or beside failures
    is_fresh: bool = False  # what is measured is measured again


# Its command, or why it has none.
Command = Callable[[Context], "list[str] | str"]


@dataclass(frozen=True)
class Stage:
    """One stage."""

    about: str  # what it does
    seconds: int  # planned, after which it is ended
    command: Command
    needs_gpu: bool = True  # without one it is skipped
    is_extra: bool = False  # it runs only when it is named


def _python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _output(context: Context, file: str) -> tuple[object, ...]:
    return "--output", context.results / file, *(("--fresh",) if context.is_fresh else ())


def _module(name: str, *options: object, file: str = "") -> Command:
    """Return the command of a module beside this one, which may write a result file."""

    def command(context: Context) -> list[str]:
        output = _output(context, file) if file else ()
        return _python(f"benchmarks.systems.{name}", *options, *output)

    return command


def _tests(context: Context) -> list[str]:
    # pytest-benchmark, where it is installed, warns beside xdist, and warnings are errors.
    options = ("-v", "-rs", "-p", "no:cacheprovider", "-p", "no:benchmark")
    parallel = ("-n", "4") if find_spec("xdist") and not context.is_dry else ()
    skips = [f"--deselect={name}" for name in context.passed]
    return _python("pytest", *options, *parallel, *_TESTS, *skips)


def _sanitizer(tool: str) -> Command:
    def command(context: Context) -> list[str] | str:
        program = _python("benchmarks.systems.gpu_checks", "small")
        found = shutil.which("compute-sanitizer")
        if context.is_dry:
            return "there is no GPU to check; the stage small makes the same calls"
        if found is None:
            return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
        return [found, "--tool", tool, "--error-exitcode", "9", *program]

    return command


def _loss(*options: object, dtype: str = "bfloat16", providers: tuple[str, ...] = ()) -> Command:
    """Return the command of a comparison of losses; all of them share a file."""

    def command(context: Context) -> list[str]:
        where: tuple[object, ...] = ("--device", "cuda", "--dtypes", dtype, *options)
        if context.is_dry:
            where = ("--device", "cpu", "--dtypes", "float32", *options)
            where += ("--sizes", 24, "--error-size", 24, "--widths", 16, "--seconds", 0)
            where += ("--min-samples", 1, "--max-samples", 1)
        names = providers or (*_OWN, *_PEERS)
        output = _output(context, "contrastive_cuda.csv")
        return _python("benchmarks.loss", *where, "--providers", *names, *output)

    return command


def _speed(dtype: str, *sizes: int) -> Command:
    metrics = ("--metrics", "speed", "memory", "--labels", "without", "--seconds", 0.2)
    return _loss(*metrics, "--widths", 768, 512, 1280, "--sizes", *sizes, dtype=dtype)


def _cost_model(context: Context) -> list[str] | str:
    from benchmarks.loss.gpu_model.__main__ import select

    file = context.results / "contrastive_cuda.csv"
    if context.is_dry or not file.is_file():
        return f"no measurements of a GPU: {file} comes from the stage speed"
    try:
        select(file)
    except InputError as error:
        return str(error)
    return _python("benchmarks.loss.gpu_model", "--against", file)


_ERRORS = ("--metrics", "error", "--error-size", 1024, 4096, 16384, 65536, "--widths", 768)
_COMPILED = ("--metrics", "speed", "--labels", "without", "--sizes", 4096, 16384, "--widths", 768)
_SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# Most valuable first.
_CHECKS, _ERASURES = "gpu_checks.csv", "gpu_erasures.csv"
STAGES = {
    "warm": Stage("compile the kernels, 16 at a time", 150, _module("gpu_checks", "warm")),
    "tests": Stage("the tests that need a GPU", 300, _tests),
    "small": Stage("one small call of each kind", 40, _module("gpu_checks", "small")),
    "errors": Stage("errors against fp64, up to 65,536 pairs", 150, _loss(*_ERRORS)),
    "speed": Stage("bf16 losses against every peer", 420, _speed("bfloat16", *_SIZES)),
    "kernels": Stage("time of each kernel", 60, _module("gpu_checks", "kernels", file=_CHECKS)),
    "tiles": Stage(
        "the fastest tile of each kernel", 300, _module("gpu_tiles", "tiles", file="gpu_tiles.json")
    ),
    "graphs": Stage(
        "steps replayed as CUDA graphs", 60, _module("gpu_checks", "graphs", file=_CHECKS)
    ),
    "erasures": Stage(
        "unlearn against the plan's memory and time",
        360,
        _module("gpu_erasures", "plan", file=_ERASURES),
    ),
    "ranks": Stage(
        "NCCL and DeepSpeed on one rank", 150, _module("gpu_erasures", "ranks", file=_ERASURES)
    ),
    "repeats": Stage(
        "the same bits every time", 60, _module("gpu_checks", "repeats", file=_CHECKS)
    ),
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
    "end-to-end": Stage(
        "unlearn against a plain loop",
        480,
        _module("end_to_end", "--device", "cuda", file="end_to_end.csv"),
        is_extra=True,
    ),
}


def run_stage(
    name: str,
    context: Context,
    *,
    seconds: float | None = None,
    left: float = math.inf,
    again: bool = False,
) -> str:
    """Run one stage, and return "done", "skipped", "unfinished" or "failed".

    Args:
        seconds: its limit; None: as planned.
        left: seconds that are left of --total.
        again: it runs also if it is done or has failed.
    """
    stage, notes = STAGES[name], context.results / "gpu_stages.json"
    on_gpu = has_gpu() and not context.is_dry
    print(f"== {name}: {stage.about}", flush=True)
    if stage.needs_gpu and not on_gpu and not context.is_dry:
        print("skipped: it needs a CUDA GPU; --dry-run tries it on a CPU")
        return "skipped"
    here = {"version": code_version(), "device": device_name("cuda" if on_gpu else "cpu")}
    known: dict[str, Any] = json.loads(notes.read_text("utf-8")) if notes.is_file() else {}
    earlier = known.get(name, {})
    if any(earlier.get(key) != value for key, value in here.items()):
        earlier = {}
    before = earlier.get("state")
    if before in ("done", "failed") and not again:
        print(f"{before} before; name the stage to run it again")
        return str(before)
    passed: list[str] = earlier.get("passed", [])
    command = stage.command(context._replace(passed=tuple(passed), is_fresh=before == "done"))
    if isinstance(command, str):
        print(f"skipped: {command}")
        return "skipped"
    if left < _LEAST_SECONDS:
        print(f"not started: {max(left, 0):.0f} s are left")
        return "unfinished"
    limit = min(stage.seconds if seconds is None else seconds, left)
    log, started = context.results / "gpu_log.txt", time.monotonic()

    def note(state: str) -> None:
        took = round(time.monotonic() - started, 1)
        known[name] = {**here, "state": state, "seconds": took, "planned": stage.seconds}
        known[name] |= {"passed": passed} if state != "done" and passed else {}
        write_text(notes, json.dumps(known, indent=1) + "\n")

    note("unfinished")  # in case this process is killed
    code, said = run_command(command, log, seconds=limit, context=context)
    passed += _passed_tests(said)
    state = "unfinished" if code is None else "failed" if code else "done"
    note(state)
    took = time.monotonic() - started
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

    Return its code, None if it was ended after so many seconds, and what it said. No process of its
    group outlives this call.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, log.open("rb") as written:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        began = written.seek(0, os.SEEK_END)
        deadline, is_late = time.monotonic() + seconds, False
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(command, context),
        )
        try:
            while True:
                code = child.poll()
                sys.stdout.write(written.read().decode(errors="replace"))
                sys.stdout.flush()
                if code is not None:
                    written.seek(began)
                    return (None if is_late else code), written.read().decode(errors="replace")
                if time.monotonic() > deadline:
                    # Benchmarks have written all finished cells by then.
                    _kill_group(child)
                    is_late = True
                time.sleep(0.1)
        finally:
            _kill_group(child)
            child.wait()


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _end(number: int, frame: object) -> NoReturn:
    """End this process by an exception, so that its stage ends too."""
    raise SystemExit(128 + number)


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


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, prog="python -m benchmarks.systems.gpu_stages")
    parser.add_argument(
        "--stage", nargs="+", choices=list(STAGES), metavar="STAGE", help="only these, done or not"
    )
    parser.add_argument("--seconds", type=float, help="limit of a stage; default: as planned")
    parser.add_argument("--total", type=float, help="limit of all stages together, in seconds")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results; dry: in --work")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    args = _parser().parse_args(argv)
    total = math.inf if args.total is None else args.total
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
    asked = args.stage or [name for name in STAGES if not STAGES[name].is_extra]
    usual = signal.signal(signal.SIGTERM, _end)
    try:
        states = {
            name: run_stage(
                name,
                context,
                seconds=args.seconds,
                left=total - (time.monotonic() - started),
                again=args.stage is not None,
            )
            for name in asked
        }
    finally:
        signal.signal(signal.SIGTERM, usual)
        remove_leftovers(context.results)
    print("\n" + "\n".join(f"{name:12} {state}" for name, state in states.items()))
    if "failed" in states.values():
        return 1
    return UNFINISHED if "unfinished" in states.values() else 0


if __name__ == "__main__":
    exit_with(main)
