"""`fasterase.plan`: what an erasure of a model costs, and how to run it, before paying for it."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.planner.architecture import build_architecture
from fasterase.planner.count import FP32
from fasterase.planner.measure import Measured, measure_micro_batch
from fasterase.planner.setups import PlannedJob, Setup, choose_setup

# Dense peak of an H100 SXM in TFLOP/s (NVIDIA's data sheet), and the share of it that training a
# large ViT reaches.
_TFLOPS = {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}
EFFICIENCY = 0.4
_GPUS_PER_NODE = 8

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
_WIDTH = 98


@dataclass(frozen=True)
class Run:
    """The run that the command starts."""

    steps: int  # at most
    retain_pairs: int  # how many different ones are read
    gpu_hours: float  # of all GPUs together, at most; encoding the original's features included
    disk_bytes: int  # of the original's features of those pairs
    prefix_bytes: int  # of the outputs of frozen blocks, which `prefix_cache` stores; else 0


@dataclass(frozen=True)
class Plan:
    """What erasing costs. `str(plan)` is a table."""

    model: str  # name of the architecture
    pairs: int  # size of the retain set
    forget: int  # size of the forget set
    gpus: int
    gpu_memory: float  # GB (10^9 bytes) of each
    config: UnlearnConfig
    precision: str  # compute dtype of the towers
    parameters: int
    trained_parameters: int  # those that `config.tune` trains
    forward_flops: dict[str, int]  # tower -> FLOPs of encoding one image or text
    setup: Setup  # the recommended way to run
    setups: tuple[Setup, ...]  # all that were compared, the simplest first
    run: Run
    gpu_hours_per_epoch: float  # of training on `pairs` once; NaN on a CPU without `measure`
    disk_bytes: int  # of the original's features of `pairs` pairs, images and captions
    tflops: float  # peak of a GPU
    efficiency: float  # share of it that is assumed to be reached
    measured: Measured | None  # a micro-batch on this machine
    command: str  # words in capitals stand for paths and names to fill in
    reason: str  # why this one

    @property
    def bytes_per_gpu(self) -> dict[str, int]:
        """Part -> bytes on each GPU at the peak of a step; they add up to the peak."""
        return self.setup.bytes_per_gpu

    @property
    def micro_batch_size(self) -> int:
        """The largest micro-batch that fits, at most a GPU's share of the batch."""
        return self.setup.micro_batch_size

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of training on one pair, re-encoding included."""
        return self.setup.flops_per_pair

    def __str__(self) -> str:
        config, setup, run, measured = self.config, self.setup, self.run, self.measured
        image, text = (self.forward_flops[tower] / 1e9 for tower in ("image", "text"))
        training = f"{setup.flops_per_pair / 1e9:,.1f} GFLOP"
        encoded = "encoded once" if setup.in_one else "encoded twice"
        lines = [
            f"{self.model}: {self.parameters / 1e6:,.1f} M parameters, "
            f"{self.trained_parameters / 1e6:,.1f} M trained (tune={config.tune}), "
            f"{self.precision}",
            f"{self.pairs:,} pairs to keep, {self.forget:,} to forget; "
            f"{config.batch_size} + {config.forget_batch_size} pairs per step on {self.gpus} x "
            f"{self.gpu_memory:g} GB",
            "",
            *_memory_table(setup, self.setups),
            "",
            "Compute",
            f"  encoding an image, a text           {image:,.1f} + {text:,.1f} GFLOP",
            f"  training on a pair                  {training} ({encoded})",
            f"  an epoch over {f'{self.pairs:,} pairs':<22}{self._hours(self.gpu_hours_per_epoch)}",
            f"  the run, at most {f'{run.steps:,} steps':<19}{self._hours(run.gpu_hours)}",
            "",
            "Data",
            f"  retain pairs that the run reads     {run.retain_pairs:,} of {self.pairs:,}",
            f"  the original's features on disk     {run.disk_bytes / 1e9:,.3f} GB for these, "
            f"{self.disk_bytes / 1e9:,.1f} GB for all",
        ]
        if run.prefix_bytes:
            lines.append(
                f"  outputs of frozen blocks on disk    {run.prefix_bytes / 1e9:,.3f} GB at most; "
                "the compute above is without them"
            )
        if measured is not None:
            lines += [
                "",
                f"Measured here ({measured.device}, {measured.pairs} pairs): activations of "
                f"{measured.activation_bytes / 1e9:.2f} GB, not "
                f"{measured.counted_bytes / 1e9:.2f} GB; "
                f"so those above are multiplied by {measured.correction:.2f}.",
                f"Speed here: {measured.tflops:.3g} TFLOP/s.",
            ]
        lines += ["", *textwrap.wrap(self.reason, _WIDTH), "", _wrap_command(self.command)]
        return "\n".join(lines)

    def _hours(self, hours: float) -> str:
        if math.isnan(hours):
            return "unknown on a CPU without --tflops or --measure"
        return f"{hours:,.2f} GPU-hours at {self.efficiency:.0%} of {self.tflops:,.4g} TFLOP/s"


def plan(
    model: nn.Module | DualEncoder | str | os.PathLike[str] | Any,
    pairs: int,
    *,
    forget: int | None = None,
    gpus: int = 1,
    gpu_memory: float = 80,
    tflops: float | None = None,
    efficiency: float = EFFICIENCY,
    measure: bool = False,
    config: UnlearnConfig | None = None,
    **overrides: Any,
) -> Plan:
    """Estimate memory, time and disk of an erasure from the model's architecture alone.

    No weights are read. The towers run on tensors without storage, and FLOPs and live bytes are
    counted (`fasterase/planner/count.py`).

    Args:
        model: in any form that `unlearn` takes, an open_clip name without a tag, or a transformers
            configuration. Only configurations on a hub need the network.
        pairs: size of the retain set.
        forget: size of the forget set; None: a hundredth of `pairs`.
        gpus: how many GPUs.
        gpu_memory: of each, in GB (10^9 bytes).
        tflops: dense peak of a GPU in TFLOP/s; None: an H100's in this precision.
        efficiency: share of `tflops` that training reaches.
        measure: run a micro-batch with random weights on this machine, and correct the memory of
            activations by what it needs.
        config: settings as for `unlearn`. `micro_batch_size` bounds the micro-batch.
        overrides: fields of `UnlearnConfig`. `device="cpu"` plans for a CPU.

    Raises:
        InputError: the architecture is unknown, a number is out of range, or `prefix_cache` is not
            for this run.
    """
    config = (config or UnlearnConfig()).replace(**overrides)
    forget = max(1, pairs // 100) if forget is None else forget
    for name, value in (
        ("pairs", pairs), ("forget", forget), ("gpus", gpus), ("gpu_memory", gpu_memory),
        ("efficiency", efficiency), ("tflops", 1 if tflops is None else tflops),
    ):  # fmt: skip
        if not value > 0:
            raise InputError(f"{name}={value!r} must be above 0.")
    job = PlannedJob(build_architecture(model), config, pairs, forget, gpus)
    prefix_bytes = job.prefix_bytes()
    measured = measure_micro_batch(job.model, precision=job.precision) if measure else None
    setups = job.setups(gpu_memory, measured.correction if measured else 1.0)
    setup = choose_setup(setups, gpus, gpu_memory)
    if tflops is None:
        tflops = _TFLOPS[job.precision] if job.on_gpu else math.nan
    if measured is not None and not job.on_gpu:
        tflops, efficiency = measured.tflops, 1.0
    per_hour = tflops * 1e12 * efficiency * 3600
    feature_row = 8 + job.model.embed_dim * (2 if job.on_gpu and job.precision != "fp32" else FP32)
    run = Run(
        steps=job.steps,
        retain_pairs=job.retain_pairs,
        gpu_hours=job.flops(setup) / per_hour,
        disk_bytes=2 * job.retain_pairs * feature_row,
        prefix_bytes=prefix_bytes,
    )
    return Plan(
        model=job.model.name,
        pairs=pairs,
        forget=forget,
        gpus=gpus,
        gpu_memory=gpu_memory,
        config=config,
        precision=job.precision,
        parameters=job.counts.total,
        trained_parameters=job.counts.trained,
        forward_flops=job.forward_flops,
        setup=setup,
        setups=tuple(setups),
        run=run,
        gpu_hours_per_epoch=pairs * setup.flops_per_pair / per_hour,
        disk_bytes=2 * pairs * feature_row,
        tflops=tflops,
        efficiency=efficiency,
        measured=measured,
        command=_write_command(_name_for_command(model), config, setup, gpus),
        reason=_explain(setup, setups, gpus, job.share),
    )


def _name_for_command(model: Any) -> str:
    """Return what `--model` is given: an open_clip name needs a tag for its weights."""
    if not isinstance(model, str | os.PathLike):
        return "MODEL"
    import open_clip

    name = os.fspath(model)
    if name not in open_clip.list_models():
        return name
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"{name}/{tags[0] if len(tags) == 1 else 'TAG'}"


def _write_command(model: str, config: UnlearnConfig, setup: Setup, gpus: int) -> str:
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
        f"{launcher}fasterase unlearn --model {model} --forget FORGET --retain RETAIN "
        "--output_dir RUN"
    ]
    chosen = config.to_dict() | {
        "optimizer": setup.optimizer,
        "activation_checkpointing": setup.activation_checkpointing,
        "micro_batch_size": None if setup.in_one else setup.micro_batch_size,
    }
    defaults = UnlearnConfig().to_dict()
    for name, value in chosen.items():
        if value != defaults[name]:
            words.append(f"--{name} {','.join(map(str, value)) if name == 'betas' else value}")
    if setup.parallel != "plain":
        words.append(f"--deepspeed {setup.parallel}.json")
    return " ".join(words)


def _explain(setup: Setup, setups: list[Setup], gpus: int, share: int) -> str:
    """Say why `setup`, and why none of the simpler ones."""
    whole = f"a GPU's share of {share} pairs" if gpus > 1 else f"the batch of {share} pairs"
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
            found = f"only {other.micro_batch_size} pairs fit at a time, each to be encoded twice"
        elif other.cost > 1.01 * setup.cost:
            found = "a pair would take longer"
        else:
            found = f"the peak of {other.peak_bytes / 1e9:.1f} GB would leave little room"
        sentences.append(f"With {other.name} {found}.")
    return " ".join(sentences)


def _memory_table(setup: Setup, setups: Sequence[Setup]) -> list[str]:
    parts = {
        text.format(optimizer=setup.optimizer, pairs=setup.micro_batch_size): setup.bytes_per_gpu[
            part
        ]
        for part, text in _PARTS.items()
    }
    return [
        "Memory of each GPU at the peak of a step, GB",
        *(f"  {label:<42}{size / 1e9:>9.2f}" for label, size in parts.items()),
        f"  {'peak':<42}{setup.peak_bytes / 1e9:>9.2f}",
        "",
        f"{'Ways to run':<54}{'pairs at a time':>16}{'peak GB':>10}{'GFLOP per pair':>17}",
        *(
            f"{'*' if each is setup else ' '} {each.name:<52}"
            f"{each.micro_batch_size or 'none fits':>16}"
            f"{each.peak_bytes / 1e9:>10.1f}{each.flops_per_pair / 1e9:>17,.1f}"
            for each in setups
        ),
    ]


def _wrap_command(command: str) -> str:
    # A flag and its value stay on one line.
    glued = re.sub(r"(--\w+) (?!-)", "\\1\0", command)
    wrapper = textwrap.TextWrapper(
        _WIDTH - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(wrapper.wrap(glued)).replace("\0", " ")
