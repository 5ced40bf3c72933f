"""Non-finite losses and gradients: leave the step out, and stop after a few in a row."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from fasterase.errors import NonFiniteError
from fasterase.objective import EraseLoss

log = logging.getLogger(__name__)

# fp16 overflows on purpose while the loss scale finds its level (it halves at each overflow, from
# 2^16), so a run in fp16 is given that many steps before it counts as broken.
LIMITS = {"fp32": 3, "bf16": 3, "fp16": 20}


class NonFiniteGuard:
    """Counts steps in a row that could not be applied.

    Args:
        precision: compute dtype, which sets how many such steps in a row are too many.

    Attributes:
        in_a_row: the count; a resumed run sets it.
    """

    def __init__(self, precision: str) -> None:
        self.limit = LIMITS[precision]
        self.in_a_row = 0

    def count(self, term: str | None, *, step: int, ids: Sequence[str]) -> None:
        """Take note of a step: `term` is what was not finite in it, None for a good step.

        Raises:
            NonFiniteError: too many in a row were not; names the term, the step and the pair ids.
        """
        if term is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        log.warning("Step %d: %s is not finite; the step is not applied.", step, term)
        if self.in_a_row >= self.limit:
            shown = ", ".join(ids[:8]) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
            raise NonFiniteError(
                f"{term} is not finite at step {step}, for the {self.in_a_row}. step in a row. The "
                f"model holds the weights of the last good step. Pairs of this step: {shown}. "
                "Try a lower lr, max_grad_norm=1.0 or precision='fp32', and look at these pairs.",
                term=term,
                step=step,
                pair_ids=ids,
            )


def non_finite_term(loss: EraseLoss, grad_norm: float) -> str | None:
    """The first loss term that is NaN or infinite, else `"gradient"` if the norm is, else None."""
    for name in ("forget", "retain", "consistency", "anchor", "total"):
        if not math.isfinite(float(getattr(loss, name))):
            return name
    return None if math.isfinite(grad_norm) else "gradient"
