"""The contrastive operator in C++ (csrc/), as torch operators.

Memory O(N D) for the gradients, `_KEPT_BYTES` of logits between the passes at most (one such block
stays for the next call; the system may take its pages meanwhile), and two tiles a thread. FLOPs,
forward and backward: 8 n^2 D a group with the KL where its logits are kept, 12 where they are not
(6 and 8 without the KL).
"""

from __future__ import annotations

import torch

from fasterase.ops.contrastive.operator import Batch, Groups, register

# Edge of a tile: two fp32 tiles of 512 x 512 (S and S0) are 2 MB.
_TILE = 512
# Logits that the forward pass may keep for the backward pass, which else computes them again: both
# fp32 matrices of N = 4096. Keeping all takes 8 instead of 12 N^2 D FLOPs with the KL.
_KEPT_BYTES = 128 * 2**20
# Keeping less than this share of the logits would save under a twelfth of the FLOPs.
_LEAST_SHARE = 0.25


def _options(batch: Batch, groups: Groups, is_differentiable: bool) -> tuple[int, int]:
    """(tile, kept): the edge of a tile, and how many logits the forward pass keeps."""
    if not is_differentiable:
        return _TILE, 0
    logits = batch.matrices * sum(n * n for n in groups)
    kept = min(_KEPT_BYTES // batch.scale.itemsize, logits)
    return _TILE, kept if kept >= _LEAST_SHARE * logits else 0


contrastive_cpu = register(
    "contrastive_cpu",
    {
        "logits": lambda batch, groups, tile, kept: batch.scale.new_empty(kept),
        "plan": lambda batch, groups, tile, kept: batch.scale.new_empty(
            len(groups), 2, dtype=torch.long
        ),
    },
    options_schema="int tile, SymInt kept",
    options=_options,
)
