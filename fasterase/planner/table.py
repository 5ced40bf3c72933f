"""The table of a plan, the reasons for what it recommends, and the command."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fasterase.config import UnlearnConfig
from fasterase.numerals import counted
from fasterase.report.templating import render

if TYPE_CHECKING:
    from fasterase.planner.plan import Plan, Setup

_GPUS_PER_NODE = 8

_PARTS = {
    "weights": "weights in fp32",
    "gradients": "gradients in fp32, whole",
    "optimizer_states": "states of {optimizer}",
    "partitions": "DeepSpeed's copies of this GPU's share",
    "activations": "activations of {pairs}",
    "features": "features of the batch",
    "loss": "workspace of the loss",
    "update": "update, beyond room left by activations",
}
_COMMAND_WIDTH = 96
_SCORE_BYTES = 4 + 1 + 1  # of `fasterase.find`: a score, a decision, whether the name is there


def plan_table(plan: Plan) -> str:
    """Return what `str(plan)` is."""

    def gpu_hours(hours: float) -> str:
        if math.isnan(hours):
            return "unknown on a CPU without --tflops or --measure"
        return f"{hours:,.2f} GPU-hours at {plan.efficiency:.0%} of {plan.tflops:,.4g} TFLOP/s"

    def wall_clock(pairs: int, hours: float) -> str:
        fed, alone = (
            describe_hours(plan.feeding.hours(pairs, hours, plan.gpus, workers=each))
            for each in (plan.feeding.workers, 0)
        )
        return f"{fed:<16}{alone}"

    return render(
        "plan.txt",
        plan=plan,
        titles=_PARTS,
        score_bytes=_SCORE_BYTES,
        gpu_hours=gpu_hours,
        wall_clock=wall_clock,
        wrap=textwrap.fill,
        wrap_command=_wrap_command,
    )


def write_command(
    name: str, config: UnlearnConfig, setup: Setup, gpus: int, num_workers: int | str
) -> str:
    """Return the command that makes the run as planned."""
    import open_clip

    if name in open_clip.list_models():  # needs a tag for its weights
        tags = open_clip.list_pretrained_tags_by_model(name)
        name = f"{name}/{tags[0] if len(tags) == 1 else 'TAG'}"
    nodes, rest = divmod(gpus, _GPUS_PER_NODE)
    launcher = ""
    if gpus > 1 and setup.parallel != "plain":
        where = "--hostfile HOSTS" if nodes > 1 else f"--num_gpus {gpus}"
        launcher = f"deepspeed {where} --module "
    elif nodes > 1 and not rest:
        launcher = (
            f"torchrun --nnodes {nodes} --nproc_per_node {_GPUS_PER_NODE} --rdzv_backend c10d "
            "--rdzv_endpoint HOST:29400 -m "
        )
    elif gpus > 1:
        launcher = f"torchrun --nproc_per_node {gpus} -m "
    words = [
        f"{launcher}fasterase unlearn --model {shlex.quote(name)} --forget FORGET --retain RETAIN "
        "--output_dir RUN"
    ]
    chosen = config.to_dict() | {
        "optimizer": setup.optimizer,
        "activation_checkpointing": setup.activation_checkpointing,
        "micro_batch_size": None if setup.in_one else setup.micro_batch_size,
        "num_workers": num_workers,
    }
    defaults = UnlearnConfig().to_dict()
    for field, value in chosen.items():
        if value != defaults[field] and field not in ("output_dir", "deepspeed"):
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words.append(f"--{field} {shlex.quote(text)}")
    if setup.parallel != "plain":
        words.append(f"--deepspeed {setup.parallel}.json")
    return " ".join(words)


def explain(setup: Setup, setups: Sequence[Setup], gpus: int, share: int) -> str:
    """Say why `setup`, and why none of the simpler ones."""
    whole = "a GPU's share of " if gpus > 1 else "the batch of "
    whole += counted(share, "pair")
    once = (
        "one micro-batch, so that nothing is encoded twice."
        if setup.in_one
        else f"micro-batches of {setup.micro_batch_size}, each encoded twice (GradCache)."
    )
    sentences = [
        f"{setup.name[0].upper()}{setup.name[1:]} fits: {setup.peak_bytes / 1e9:.1f} GB at the "
        f"peak, with {whole} in {once}"
    ]
    for other in setups[: setups.index(setup)]:
        if other.micro_batch_size == 0:
            found = "not even one pair fits"
        elif setup.in_one and not other.in_one:
            fits = counted(other.micro_batch_size, "pair fits", "pairs fit")
            found = f"only {fits} at a time, each to be encoded twice"
        elif other.cost > 1.01 * setup.cost:
            found = "a pair would take longer"
        else:
            found = f"the peak of {other.peak_bytes / 1e9:.1f} GB would leave little room"
        sentences.append(f"With {other.name} {found}.")
    return " ".join(sentences)


def _wrap_command(command: str) -> str:
    # A flag and its value stay on one line.
    glued = re.sub(r"(--\w+) (?!-)", "\\1\0", command)
    wrapper = textwrap.TextWrapper(
        _COMMAND_WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(wrapper.wrap(glued)).replace("\0", " ")


def describe_hours(hours: float) -> str:
    """Return `42 s`, `31.5 min` or `4.2 h`."""
    if math.isnan(hours):
        return "unknown"
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.1f} min" if hours < 2 else f"{hours:,.1f} h"
