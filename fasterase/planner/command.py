"""The command that a plan recommends, and the reason for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fasterase.config import UnlearnConfig

if TYPE_CHECKING:
    from fasterase.planner.plan import Setup

_GPUS_PER_NODE = 8


def name_for_command(model: Any) -> str:
    """Return what `--model` is given: an open_clip name needs a tag for its weights."""
    if not isinstance(model, str | os.PathLike):
        return "MODEL"
    import open_clip

    name = os.fspath(model)
    if name not in open_clip.list_models():
        return name
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"{name}/{tags[0] if len(tags) == 1 else 'TAG'}"


def write_command(model: str, config: UnlearnConfig, setup: Setup, gpus: int) -> str:
    nodes, rest = divmod(gpus, _GPUS_PER_NODE)
    if gpus == 1:
        words = ["fasterase unlearn"]
    elif setup.parallel == "plain":
        where = f"--nproc_per_node {gpus}"
        if nodes > 1 and not rest:
            where = (
                f"--nnodes {nodes} --nproc_per_node {_GPUS_PER_NODE} --rdzv_backend c10d "
                "--rdzv_endpoint HOST:29400"
            )
        words = [f"torchrun {where} -m fasterase unlearn"]
    else:
        where = "--hostfile HOSTS" if nodes > 1 else f"--num_gpus {gpus}"
        words = [f"deepspeed {where} --module fasterase unlearn"]
    words.append(f"--model {model} --forget FORGET --retain RETAIN --output_dir RUN")
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


def explain(setup: Setup, setups: list[Setup], gpus: int, share: int) -> str:
    """Say why `setup`, and why none of the simpler ones."""
    whole = f"a GPU's share of {share} pairs" if gpus > 1 else f"the batch of {share} pairs"
    once = (
        f"with {whole} in one micro-batch, so that nothing is encoded twice."
        if setup.in_one
        else f"with {whole} in micro-batches of {setup.micro_batch_size}, each encoded twice "
        "(GradCache)."
    )
    name = setup.describe(gpus)
    sentences = [
        f"{name[0].upper()}{name[1:]} fits: {setup.peak_bytes / 1e9:.1f} GB at the peak, {once}"
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
        sentences.append(f"With {other.describe(gpus)} {found}.")
    if setup.parallel == "zero1":
        (zero3,) = (
            each
            for each in setups
            if each.parallel == "zero3"
            and each.optimizer == setup.optimizer
            and each.activation_checkpointing == setup.activation_checkpointing
        )
        lasting = ("weights", "gradients", "optimizer_states", "partitions")
        saved = sum(setup.bytes_per_gpu[part] - zero3.bytes_per_gpu[part] for part in lasting)
        sentences.append(
            "ZeRO-2 would save nothing more, since local gradients stay whole at every stage; "
            f"ZeRO-3 would save {saved / 1e9:.1f} GB and gather the weights anew in every pass."
        )
    return " ".join(sentences)
