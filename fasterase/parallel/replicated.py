"""Plain data parallelism: every rank holds all weights, and gradients are averaged once a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from fasterase.parallel.local import LocalEngine

# Gradients that travel together: enough to fill a network, few enough to copy (256 MB of fp32).
_BUCKET_NUMBERS = 1 << 26


class ReplicatedEngine(LocalEngine):
    """A `LocalEngine` on each of several ranks, with one averaging of the gradients a step.

    Without DistributedDataParallel, whose hooks would reduce in every backward pass of a
    micro-batch.
    """

    @contextlib.contextmanager
    def one_reduction(self) -> Iterator[None]:
        with super().one_reduction():
            yield
        bucket: list[Tensor] = []
        numbers = 0
        for parameter in self._parameters.values():
            if parameter.grad is None:
                continue
            if bucket and numbers + parameter.numel() > _BUCKET_NUMBERS:
                self._ranks.average(bucket)
                bucket, numbers = [], 0
            bucket.append(parameter.grad)
            numbers += parameter.numel()
        if bucket:
            self._ranks.average(bucket)
