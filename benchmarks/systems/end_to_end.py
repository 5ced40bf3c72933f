"""Measure a whole erasure: `fasterase.unlearn` against a loop in plain open_clip.

    python -m benchmarks.systems.end_to_end [--model NAME --lr RATE] [--tune last:1 --layers 12]

Both train the paper's objective on the same pairs, in the same order, with the same optimiser and
fixed numbers for lr and steps (by default those that the demo's comparison uses, on its model and
pairs). The loop (`naive_erasure`) runs the original model in every step and computes the losses on
whole matrices in eager PyTorch. With `--tune last:N` both train the same blocks, and `unlearn`
keeps what the frozen ones put out. `--layers` repeats the blocks of the model until each tower has
as many: larger towers, but no model that knows anything.

The bound of the advantage is that of the FLOPs of the towers, counted with a caption for each pair:
the loop encodes each pair twice and goes back through what is trained. `unlearn` encodes the
distinct retain pairs once with the original. With frozen blocks it runs these once per distinct
pair, and in the steps only the rest.

Each run has a process of its own; the two take turns. Measured are

    seconds          the whole call. `unlearn` also encodes the retain set once with the original,
                     and decides on a verdict; the loop does neither.
    cpu_seconds      of all threads of the process in these, which other processes of a shared
                     machine disturb less
    first_step       seconds of these until the end of the first step
    pairs_per_second pairs of all steps, divided by the seconds of the whole call
    step_ms          median time from the end of a step to the end of the next, loading included
    peak_mib         peak memory above that before the model was loaded: resident memory on a CPU,
                     torch's allocator on a GPU
    verdict, residue of `fasterase.evaluate`, for both

Every run becomes one row of benchmarks/results/end_to_end.csv at once. An interrupted command
resumes from there; --fresh measures its setting again.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fasterase
from benchmarks.command import exit_with, new_parser
from benchmarks.processes import MeasurementError, call_in_process
from benchmarks.result_files import (
    RESULTS,
    code_version,
    device_name,
    group_rows,
    markdown_table,
    read_csv,
    write_csv,
)
from benchmarks.systems.naive_erasure import erase_naively
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.run import BATCHES, CLIPERASE
from fasterase.demo.sets import DemoSets, build_sets
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import Halfway, SplitTower
from fasterase.models.load import load_model
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.sampler import Sampler
from fasterase.planner.count import PeakMemory

IMPLEMENTATIONS = ("fasterase", "naive")
_LARGER_IS_BETTER = ("pairs_per_second",)
# A run that takes longer has hung.
_LIMIT_SECONDS = 6 * 3600.0
# Disk for the outputs of frozen blocks.
_CACHE_GB = 50.0
# Pairs of a pass of the tuned blocks, whose FLOPs are counted: below these, one picture is encoded.
_BOUND_ROWS = 64


@dataclass(frozen=True)
class Setting:
    """What both implementations do; equal settings give comparable runs."""

    model: str  # a name or folder of an open_clip model
    concept: str  # which emoji to forget, as in the demo
    device: str
    steps: int
    lr: float
    batch_size: int
    forget_batch_size: int
    seed: int
    max_pairs: int  # pairs measured per set for the verdict
    tune: str = "all"  # what is trained: `"all"`, `"last:N"` or `"projections"`
    layers: int = 0  # of each tower; 0: as the model has them

    def config(self) -> UnlearnConfig:
        """Return the paper's objective with these numbers, for both implementations."""
        return UnlearnConfig.cliperase(
            lr=self.lr,
            max_steps=self.steps,
            consistency_weight=CLIPERASE["consistency_weight"],
            batch_size=self.batch_size,
            forget_batch_size=self.forget_batch_size,
            precision="bf16" if self.device == "cuda" else "fp32",
            seed=self.seed,
            evaluation=None,
            progress=False,
            tune=self.tune,
            prefix_cache=None if self.tune == "all" else _CACHE_GB,
        )


def measure(implementation: str, setting: Setting) -> dict[str, Any]:
    """Carry out one run in this process; return its measurements."""
    # Its text features choose the neighbours; and what this loads is loaded for both.
    sets = build_sets(setting.concept, original=setting.model, seed=setting.seed)
    peak = PeakMemory(setting.device)
    encoder = load_model(setting.model)
    if setting.layers:
        _repeat_blocks(encoder, setting.layers)
    encoder.module.to(setting.device)
    bound = _bound(encoder, sets, setting)
    original = copy.deepcopy(encoder.module) if setting.layers else setting.model
    run = {"fasterase": _run_fasterase, "naive": _run_naive}[implementation]
    started, cpu_started = time.perf_counter(), time.process_time()
    step_ends = run(encoder, sets, setting)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak_bytes = peak.bytes()
    evaluation = fasterase.evaluate(
        encoder,
        sets.forget,
        sets.retain,
        original=original,
        max_pairs=setting.max_pairs,
        device=setting.device,
        progress=False,
    )
    pairs = min(setting.batch_size, len(sets.retain))
    pairs += min(setting.forget_batch_size, len(sets.forget))
    return {
        "seconds": seconds,
        "first_step": step_ends[0] - started,
        "pairs_per_second": setting.steps * pairs / seconds,
        "step_ms": 1e3 * float(np.median([b - a for a, b in pairwise(step_ends)])),
        "peak_mib": peak_bytes / 2**20,
        "verdict": evaluation.verdict,
        "residue": evaluation.residue,
        "bound": bound,
        "cpu_seconds": cpu_seconds,
    }


def _repeat_blocks(encoder: DualEncoder, layers: int) -> None:
    """Give each tower so many blocks: copies of its own, in turn."""
    module: Any = encoder.module
    for transformer in (module.visual.transformer, module.transformer):
        own = list(transformer.resblocks)
        copies = (copy.deepcopy(own[i % len(own)]) for i in range(layers))
        transformer.resblocks = torch.nn.ModuleList(copies)


def _bound(encoder: DualEncoder, sets: DemoSets, setting: Setting) -> float:
    """Return the FLOPs of the loop's towers over those of the library's."""
    pixels = torch.zeros(1, 3, *encoder.image_size, device=encoder.device)
    tokens = Tokens(pixels.new_zeros(1, encoder.context_length, dtype=torch.int64))
    # With a graph: without one, attention takes a path that is not counted.
    with FlopCounterMode(display=False) as whole:
        encoder.encode_image(pixels)
        encoder.encode_text(tokens)
    forward = whole.get_total_flops()
    trained = forward
    if setting.tune != "all":
        # Not below: a new split tries two empty pairs, up to the last frozen block.
        given = (("image", pixels), ("text", tokens))
        splits = [(SplitTower(encoder, tower, setting.tune), each) for tower, each in given]
        with FlopCounterMode(display=False) as upper:
            for split, each in splits:
                rows = torch.zeros(_BOUND_ROWS, split.width, device=encoder.device)
                texts = each.index([0] * len(rows)) if isinstance(each, Tokens) else None
                Halfway(split, rows, texts).finish()
        trained = upper.get_total_flops() // _BOUND_ROWS
    drawn = ((setting.batch_size, len(sets.retain)), (setting.forget_batch_size, len(sets.forget)))
    pairs = sum(setting.steps * min(size, count) for size, count in drawn)
    distinct = sum(min(count, setting.steps * size) for size, count in drawn)
    retained = min(len(sets.retain), setting.steps * setting.batch_size)
    naive = pairs * (2 * forward + 2 * trained)
    own = pairs * 3 * trained + distinct * (forward - trained) + retained * trained
    return naive / own


def _run_fasterase(encoder: DualEncoder, sets: DemoSets, setting: Setting) -> list[float]:
    ends: list[float] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict")  # it is in the results
        fasterase.unlearn(
            encoder.module,
            sets.forget,
            sets.retain,
            config=setting.config(),
            tokenizer=encoder.companions.tokenizer,
            preprocess=encoder.companions.preprocess,
            callback=lambda record: ends.append(time.perf_counter()),
        )
    return ends


def _run_naive(encoder: DualEncoder, sets: DemoSets, setting: Setting) -> list[float]:
    ends: list[float] = []
    if not hasattr(encoder.module, "visual"):
        raise MeasurementError(f"the loop trains open_clip models; {setting.model} is not one")
    sampler = Sampler(
        len(sets.forget),
        len(sets.retain),
        forget_batch_size=setting.forget_batch_size,
        batch_size=setting.batch_size,
        seed=setting.seed,
    )
    if setting.tune != "all":
        chosen = {id(parameter) for _, parameter in encoder.trainable(setting.tune)}
        for parameter in encoder.module.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    erase_naively(
        encoder.module,
        sets.forget,
        sets.retain,
        map(sampler.draw, range(setting.steps)),
        config=setting.config(),
        preprocess=encoder.companions.preprocess,
        tokenizer=encoder.companions.tokenizer,
        after_step=lambda: ends.append(time.perf_counter()),
    )
    return ends


def summarise(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table per setting: quantiles, and the library's advantage over the loop.

    An advantage is a ratio of medians; it is bold where the intervals from the 20th to the 80th
    percentile of at least three runs each do not overlap.
    """
    names = [field.name for field in fields(Setting)]
    blocks = group_rows(rows, *names, "gpu_name", "threads")
    return "\n".join(map(_table, blocks.values()))


def _table(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    title = (
        f"**{first['model']}, {first['concept']}, tune={first['tune']}, {first['layers']} layers "
        f"(0: its own), {first['steps']} steps of {first['batch_size']} + "
        f"{first['forget_batch_size']} pairs; {first['gpu_name']}, {first['threads']} threads; "
        f"torch {first['torch']}**"
    )
    runs = [[row for row in rows if row["implementation"] == name] for name in IMPLEMENTATIONS]
    lines = []
    for name in (*_LARGER_IS_BETTER, "step_ms", "seconds", "cpu_seconds", "first_step", "peak_mib"):
        samples = [[float(row[name]) for row in those] for those in runs]
        cells = [
            " / ".join(f"{q:,.4g}" for q in np.quantile(v, (0.2, 0.5, 0.8))) if v else "–"
            for v in samples
        ]
        own, naive = samples
        lines.append([name, *cells, _advantage(own, naive, name in _LARGER_IS_BETTER)])
    verdicts = (
        f"{row['verdict']} ({float(row['residue']):.2f})" if row["residue"] else "none"
        for row in rows
    )
    told = dict.fromkeys(zip(verdicts, (row["implementation"] for row in rows), strict=True))
    by_name = [", ".join(text for text, of in told if of == name) for name in IMPLEMENTATIONS]
    lines.append(["verdict (residue)", *by_name, ""])
    bound = np.median([float(row["bound"]) for row in rows])
    lines.append(["bound by FLOPs", "", "", f"{bound:.2f}x"])
    lines.append(["runs", *(str(len(those)) for those in runs), ""])
    columns = ["p20 / p50 / p80", *IMPLEMENTATIONS, "advantage"]
    return f"{title}\n\n{markdown_table(columns, lines)}"


def _advantage(own: list[float], naive: list[float], is_larger_better: bool) -> str:
    if not own or not naive:
        return "–"
    better, worse = (own, naive) if is_larger_better else (naive, own)
    text = f"{np.median(better) / np.median(worse):.2f}x"
    (low, high), (other_low, other_high) = (np.quantile(v, (0.2, 0.8)) for v in (own, naive))
    is_clear = min(len(own), len(naive)) >= 3 and (high < other_low or other_high < low)
    return f"**{text}**" if is_clear else text


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    here = {
        **{name: str(value) for name, value in asdict(setting).items()},
        "gpu_name": device_name(setting.device),
        "threads": str(torch.get_num_threads()),
    }
    rows = read_csv(args.output)
    if args.fresh:
        rows = [row for row in rows if not here.items() <= row.items()]
    same = [row for row in rows if here.items() <= row.items()]
    done = {(row["implementation"], row["repeat"]) for row in same}
    # Each round starts with another one, so that a drift of the machine affects both alike.
    order = [
        (name, str(repeat))
        for repeat in range(args.repeats)
        for name in (IMPLEMENTATIONS if repeat % 2 == 0 else IMPLEMENTATIONS[::-1])
    ]
    for name, repeat in tqdm(
        [run for run in order if run not in done], unit="run", dynamic_ncols=True, disable=None
    ):
        load = os.getloadavg()[0]
        sample = call_in_process(measure, name, setting, seconds=_LIMIT_SECONDS, preload=[])
        measured = {k: f"{v:.6g}" if isinstance(v, float) else v or "" for k, v in sample.items()}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = {"implementation": name, "repeat": repeat, **here, **measured, "load": f"{load:.1f}"}
        versions = {"torch": torch.__version__, "version": code_version()}
        rows.append({**row, **versions, "timestamp": now})
        write_csv(args.output, rows)
    print(f"{len(rows)} rows in {args.output}\n")
    print(summarise([row for row in rows if here.items() <= row.items()]))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, prog="python -m benchmarks.systems.end_to_end")
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Not an absolute path, which would name a folder of this machine in the results.
    base = os.path.relpath(emoji.BASE_MODEL)
    add("--model", default=base, help="an open_clip model by name or folder")
    add("--concept", default=emoji.DEFAULT_FORGET, help="group, subgroup or expression")
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--steps", type=int, default=CLIPERASE["max_steps"])
    add("--lr", type=float, default=CLIPERASE["lr"])
    add("--batch-size", type=int, default=BATCHES["batch_size"])
    add("--forget-batch-size", type=int, default=BATCHES["forget_batch_size"])
    add("--seed", type=int, default=0)
    add("--max-pairs", type=int, default=500, help="pairs measured per set for the verdict")
    add("--tune", default="all", help="what is trained; frozen blocks run once a pair")
    add("--layers", type=int, default=0, help="of each tower; 0: as the model has them")
    add("--repeats", type=int, default=5, help="runs of each implementation")
    add("--threads", type=int, help="CPU threads; default: torch's")
    add("--output", type=Path, default=RESULTS / "end_to_end.csv")
    add("--fresh", action="store_true", help="measure everything again")
    return parser


if __name__ == "__main__":
    exit_with(main)
