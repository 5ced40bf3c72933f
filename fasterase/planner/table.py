"""A plan as text: every number of it, with what it is made of."""

from __future__ import annotations

import math
import shlex
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasterase.planner.plan import Plan, Setup

_WIDTH = 98
_PARTS = {
    "weights": "weights in fp32",
    "gradients": "gradients in fp32, whole",
    "optimizer_states": "states of {optimizer}",
    "partitions": "DeepSpeed's copies of this GPU's share",
    "activations": "activations of {pairs} pairs",
    "features": "features of the batch",
    "loss": "workspace of the loss",
    "update": "update, beyond room left by activations",
}


def format_plan(plan: Plan) -> str:
    """Return the table of a plan."""
    config, setup = plan.config, plan.setup
    image, text = (plan.forward_flops[tower] / 1e9 for tower in ("image", "text"))
    lines = [
        f"{plan.model}: {plan.parameters / 1e6:,.1f} M parameters, "
        f"{plan.trained_parameters / 1e6:,.1f} M trained (tune={config.tune}), {plan.precision}",
        f"{plan.pairs:,} pairs to keep, {plan.forget:,} to forget; "
        f"{config.batch_size} + {config.forget_batch_size} pairs per step on {plan.gpus} x "
        f"{plan.gpu_memory:g} GB",
        "",
        "Memory of each GPU at the peak of a step, GB",
        *(
            f"  {label.format(optimizer=setup.optimizer, pairs=setup.micro_batch_size):<42}"
            f"{setup.bytes_per_gpu[part] / 1e9:>9.2f}"
            for part, label in _PARTS.items()
        ),
        f"  {'peak':<42}{setup.peak_bytes / 1e9:>9.2f}",
        "",
        f"{'Ways to run':<54}{'pairs at a time':>16}{'peak GB':>10}{'GFLOP per pair':>17}",
        *(_format_setup(each, gpus=plan.gpus, chosen=each is setup) for each in plan.setups),
        "",
        "Compute",
        f"  encoding an image, a text           {image:,.1f} + {text:,.1f} GFLOP",
        f"  training on a pair                  {plan.flops_per_pair / 1e9:,.1f} GFLOP"
        f" ({'encoded once' if setup.in_one else 'encoded twice'})",
        f"  an epoch over {f'{plan.pairs:,} pairs':<22}"
        + _format_hours(plan, plan.gpu_hours_per_epoch),
        f"  the run, at most {f'{plan.run.steps:,} steps':<19}"
        + _format_hours(plan, plan.run.gpu_hours),
        "",
        "Data",
        f"  retain pairs that the run reads     {plan.run.retain_pairs:,} of {plan.pairs:,}",
        f"  the original's features on disk     {plan.run.disk_bytes / 1e9:,.3f} GB for these, "
        f"{plan.disk_bytes / 1e9:,.1f} GB for all",
    ]
    if plan.run.prefix_bytes:
        lines.append(
            f"  outputs of frozen blocks on disk    {plan.run.prefix_bytes / 1e9:,.3f} GB at most; "
            "the compute above is without them"
        )
    if plan.measured is not None:
        measured = plan.measured
        lines += [
            "",
            f"Measured here ({measured.device}, {measured.pairs} pairs): activations of "
            f"{measured.activation_bytes / 1e9:.2f} GB, not {measured.counted_bytes / 1e9:.2f} GB; "
            f"so those above are multiplied by {measured.correction:.2f}.",
            f"Speed here: {measured.tflops:.3g} TFLOP/s.",
        ]
    return "\n".join([*lines, "", *textwrap.wrap(plan.reason, _WIDTH), "", *_wrap_command(plan)])


def _format_hours(plan: Plan, hours: float) -> str:
    if math.isnan(hours):
        return "unknown on a CPU without --tflops or --measure"
    return f"{hours:,.2f} GPU-hours at {plan.efficiency:.0%} of {plan.tflops:,.4g} TFLOP/s"


def _format_setup(setup: Setup, *, gpus: int, chosen: bool) -> str:
    pairs = f"{setup.micro_batch_size}" if setup.micro_batch_size else "none fits"
    return (
        f"{'*' if chosen else ' '} {setup.describe(gpus):<52}{pairs:>16}"
        f"{setup.peak_bytes / 1e9:>10.1f}{setup.flops_per_pair / 1e9:>17,.1f}"
    )


def _wrap_command(plan: Plan) -> list[str]:
    words = shlex.split(plan.command)
    lines, line = [], words[0]
    for word in words[1:]:
        if word.startswith("--") and len(line) > _WIDTH - 30:
            lines.append(f"{line} \\")
            line = f"    {word}"
        else:
            line += f" {word}"
    return [*lines, line]
