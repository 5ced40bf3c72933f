"""Quantised weights: does the concept come back when the model is stored in 8 or 4 bits?

An erasure with small steps moves each weight by less than a 4-bit grid is wide, and rounding may
undo it (Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization", ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.evaluation.findings import Examined, Finding, Target, recall_finding
from fasterase.evaluation.verdict import decide, summarise

BITS = (8, 4)


def quantise(target: Target) -> Examined:
    """Judge the model again with the weights of its linear layers rounded to 8 and to 4 bits.

    Rounding is to nearest, symmetric, with one scale per output row; activations stay as they are.
    Recall on unrelated retain pairs says what the rounding costs by itself: a model that it breaks
    has forgotten everything. Costs one pass over the judged pairs per number of bits, and a second
    copy of the linear layers in memory. The model gets its own weights back.

    Raises:
        InputError: the model has no linear layer with floating-point weights. A reference without
            any gets no findings.
    """
    weights = linear_weights(target.encoder.model.module)
    if not weights:
        if target.name != "model":
            return Examined([])
        raise InputError(
            "attacks: 'quantise' rounds the weights of linear layers (nn.Linear and "
            f"nn.MultiheadAttention), and {target.encoder.model.name} has none in floating point. "
            "Leave 'quantise' out."
        )
    judge = target.evaluator.judge
    findings = []
    for bits in BITS:
        key, group = f"{bits}_bits", f"{bits}-bit weights"
        with rounded(weights, bits):
            features = target.encode(judge.rows, group)
        traces = judge.judge(features)
        verdict = decide(summarise(traces))
        assert verdict is not None
        findings.append(Finding(f"{key}/verdict", group, "verdict", "verdict", "", verdict))
        findings.append(recall_finding(features["retain"], key=f"retain/{key}", group=group))
        findings += target.traces(traces, key=key, group=group)
    return Examined(findings)


def linear_weights(module: nn.Module) -> list[Tensor]:
    """Return the floating-point matrices of linear layers, those inside attention included.

    Projections that a library keeps as bare parameters, embeddings and convolutions stay out.
    """
    found: dict[int, Tensor] = {}
    for part in module.modules():
        matrices: list[Tensor | None] = []
        if isinstance(part, nn.Linear):
            matrices = [part.weight]
        elif isinstance(part, nn.MultiheadAttention):
            # Either one matrix for queries, keys and values, or three.
            matrices = [part.in_proj_weight]
            matrices += [part.q_proj_weight, part.k_proj_weight, part.v_proj_weight]
        for weight in matrices:
            if weight is not None and weight.is_floating_point():
                found[id(weight)] = weight
    return list(found.values())


@contextmanager
def rounded(weights: Sequence[Tensor], bits: int) -> Iterator[None]:
    """Round `weights` in the block; afterwards each holds its own storage again, bit for bit."""
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = round_to_nearest(weight.data, bits)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return `scale * round(weight / scale)`, scale = max |row| / (2^(bits - 1) - 1), [out, in]."""
    levels = 2 ** (bits - 1) - 1
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, 1)
    return ((values / scale).round() * scale).to(weight.dtype)
