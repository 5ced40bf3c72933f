"""All that is to be done on a machine with a GPU, in stages of at most eight minutes.

    make gpu                 every stage that is not done yet
    make gpu STAGE=tests     one stage, done or not
    make gpu WHEELS=folder   first install the wheels of a folder; nothing needs the network

A stage that runs out of time has kept what it measured: the same command continues. What is done is
noted in runs/gpu/<stage>.json, per commit and GPU; the output of each stage goes to <stage>.log
beside it, and all results to benchmarks/results. A stage that needs a GPU, compute-sanitizer or
measurements, and lacks them, says so and counts as skipped. Under TRITON_INTERPRET=1 the stages
that can run on CPU tensors do.

The exit code is 0 if every stage is done or skipped, 1 if one failed, 75 if one is unfinished.
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

from benchmarks.command import exit_with, new_parser
from benchmarks.result_files import RESULTS, code_version, device_name
from fasterase.errors import InputError
from fasterase.files import write_text

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gpu"
SECONDS = 480.0
UNFINISHED = 75

_TESTS = (
    "tests/ops/test_contrastive_triton_gpu.py",
    "tests/ops/test_contrastive_triton_gpu_context.py",
)
_PEERS = ("memeff", "siglip_kernel", "inf_cl", "liger_kernel")
_SIZES = ("1024", "2048", "4096", "8192", "16384", "32768", "65536", "131072")

Commands = Callable[[Path, Path], "list[list[str]] | str"]


@dataclass(frozen=True)
class Stage:
    """One stage."""

    about: str  # what it does
    commands: Commands  # (results, log) -> its commands, or why it has none
    needs_gpu: bool = True  # without one it is skipped
    runs_interpreted: bool = False  # it also runs on CPU tensors under TRITON_INTERPRET=1


def _python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _tests(results: Path, log: Path) -> list[list[str]]:
    """Leave out what an unfinished run has passed, by its log."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    passed = re.findall(r"^(tests/\S+::.+?) PASSED", text, re.MULTILINE)
    skips = [f"--deselect={name}" for name in passed]
    return [_python("pytest", "-v", "-rs", "-p", "no:cacheprovider", *_TESTS, *skips)]


def _sanitizer(tool: str) -> Commands:
    def commands(results: Path, log: Path) -> list[list[str]] | str:
        found = shutil.which("compute-sanitizer")
        if found is None:
            return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
        options = ["--tool", tool, "--error-exitcode", "9"]
        return [[found, *options, *_python("benchmarks.systems.gpu_checks", "small")]]

    return commands


def _speed(dtype: str, *, sizes: tuple[str, ...]) -> Commands:
    def commands(results: Path, log: Path) -> list[list[str]]:
        providers = ("fasterase-triton", "fasterase-chunked", "torch-dense", "open_clip")
        peers = ("torch-linear-ce", "liger", "memeff", "siglip-kernel", "inf-cl")
        return [
            _python(
                "benchmarks.loss",
                *("--device", "cuda", "--dtypes", dtype, "--sizes", *sizes, "--seconds", "0.3"),
                *("--providers", *providers, *peers, "--table"),
                *("--output", results / f"contrastive_cuda_{dtype}.csv"),
            )
        ]

    return commands


def _compiled(results: Path, log: Path) -> list[list[str]]:
    """In a stage of its own: inductor takes most of a minute per size."""
    providers = ("fasterase-triton", "torch-dense", "open_clip", "open_clip-compiled")
    return [
        _python(
            "benchmarks.loss",
            *("--device", "cuda", "--dtypes", "bfloat16", "--sizes", "4096", "16384"),
            *("--widths", "768", "--labels", "without", "--providers", *providers, "--table"),
            *("--output", results / "contrastive_cuda_compiled.csv"),
        )
    ]


def _end_to_end(results: Path, log: Path) -> list[list[str]]:
    options = ("--device", "cuda", "--output", results / "end_to_end.csv")
    return [_python("benchmarks.systems.end_to_end", *options)]


def _cost_model(results: Path, log: Path) -> list[list[str]] | str:
    files = [results / f"contrastive_cuda_{dtype}.csv" for dtype in ("bfloat16", "float16")]
    found = [file for file in files if file.is_file()]
    if not found:
        return f"no measurements: {files[0]} comes from the stage speed-bf16"
    return [_python("benchmarks.loss.gpu_model", "--against", file) for file in found]


def _repeats(results: Path, log: Path) -> list[list[str]]:
    output = results / "gpu_repeats.csv"
    return [_python("benchmarks.systems.gpu_checks", "repeats", "--output", output)]


STAGES = {
    "tests": Stage("the tests that need a GPU", _tests),
    "small": Stage(
        "one small call of each kind",
        lambda results, log: [_python("benchmarks.systems.gpu_checks", "small")],
        runs_interpreted=True,
    ),
    "repeats": Stage("the same bits every time", _repeats, runs_interpreted=True),
    "memcheck": Stage("compute-sanitizer: accesses out of bounds", _sanitizer("memcheck")),
    "racecheck": Stage("compute-sanitizer: races in shared memory", _sanitizer("racecheck")),
    "speed-bf16": Stage("bf16 losses against every peer", _speed("bfloat16", sizes=_SIZES)),
    "speed-fp16": Stage("fp16 losses against every peer", _speed("float16", sizes=_SIZES)),
    "speed-fp32": Stage("fp32 losses against every peer", _speed("float32", sizes=_SIZES[:6])),
    "compiled": Stage("against compiled open_clip", _compiled),
    "end-to-end": Stage("unlearn against a plain loop", _end_to_end),
    "model": Stage("the cost model against the measurements", _cost_model, needs_gpu=False),
}


def run_stage(name: str, *, results: Path, work: Path, seconds: float, again: bool) -> str:
    """Run one stage, and return "done", "skipped", "unfinished" or "failed"."""
    stage = STAGES[name]
    note, log = work / f"{name}.json", work / f"{name}.log"
    print(f"== {name}: {stage.about}", flush=True)
    interpreted = stage.runs_interpreted and os.environ.get("TRITON_INTERPRET") == "1"
    if stage.needs_gpu and not has_gpu() and not interpreted:
        how = "; TRITON_INTERPRET=1 runs it on CPU tensors" if stage.runs_interpreted else ""
        print(f"skipped: it needs a CUDA GPU{how}")
        return "skipped"
    here = {
        "version": code_version(),
        "device": device_name("cuda" if has_gpu() else "cpu"),
        "interpreted": interpreted,
    }
    earlier = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    is_same = all(earlier.get(key) == value for key, value in here.items())
    if is_same and earlier.get("state") == "done" and not again:
        print("done before; name the stage to run it again")
        return "done"
    if not is_same or earlier.get("state") != "unfinished":
        log.unlink(missing_ok=True)
    commands = stage.commands(results, log)
    if isinstance(commands, str):
        print(f"skipped: {commands}")
        return "skipped"
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    state = "done"
    for command in commands:
        left = seconds - (time.monotonic() - started)
        code = run_command(command, log, seconds=left)
        if code is None:
            state = "unfinished"
        elif code != 0:
            state = "failed"
        if state != "done":
            break
    took = time.monotonic() - started
    write_text(note, json.dumps({**here, "state": state, "seconds": round(took, 1)}) + "\n")
    advice = {"unfinished": "; run it again to continue", "failed": f"; see {log}"}
    print(f"{state} after {took:.0f} s{advice.get(state, '')}", flush=True)
    return state


def run_command(command: list[str], log: Path, *, seconds: float) -> int | None:
    """Run a command, its output on the terminal and in `log`; return its code, None if late."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if "memcheck" in command:
        # Without the pools of torch's allocator it sees each tensor's own bounds.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with (
        log.open("ab") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        ) as child,
    ):
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        deadline = time.monotonic() + seconds
        is_late = False
        while True:
            code = child.poll()
            text = child.stdout.read() or b""
            file.write(text)
            file.flush()
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
            if code is not None:
                return None if is_late else code
            if time.monotonic() > deadline:
                # Benchmarks have written all finished cells by then; children of theirs end too.
                os.killpg(child.pid, signal.SIGKILL)
                is_late = True
            time.sleep(0.1)


def install(wheels: Path) -> None:
    """Install every wheel of a folder, without the network and without their dependencies."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise InputError(f"WHEELS: no *.whl in {wheels}. Give a folder that holds some.")
    code = subprocess.run(_python("pip", "install", "--no-index", "--no-deps", *found)).returncode
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of a stage")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args(argv)
    if args.wheels is not None:
        install(args.wheels)
    on_gpu = has_gpu()
    peers = ", ".join(name for name in _PEERS if find_spec(name)) or "none"
    print(
        f"{device_name('cuda') if on_gpu else 'no CUDA GPU'}; torch {version('torch')}; "
        f"fasterase {code_version()}; peers installed: {peers}"
    )
    states = {
        name: run_stage(
            name,
            results=args.results,
            work=args.work,
            seconds=args.seconds,
            again=args.stage is not None,
        )
        for name in ([args.stage] if args.stage else STAGES)
    }
    print("\n" + "\n".join(f"{name:12} {state}" for name, state in states.items()))
    if "failed" in states.values():
        return 1
    return UNFINISHED if "unfinished" in states.values() else 0


if __name__ == "__main__":
    exit_with(main)
