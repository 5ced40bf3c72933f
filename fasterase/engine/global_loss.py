"""The loss over the pairs of all ranks, and its gradients with respect to one's own.

The features are gathered without a graph and every rank computes the whole loss: at a batch of 32k
that is a thousandth of what the towers of ViT-bigG compute. Each rank keeps the gradients of its
own rows, so that no collective is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasterase.engine.feature_loss import FeatureGradients, FeatureLoss
from fasterase.objective import EraseLoss
from fasterase.parallel.ranks import Ranks

Reference = tuple[Tensor | None, Tensor | None, Tensor | None]


class GlobalLoss:
    """A `FeatureLoss` that takes one's own rows and acts on those of all ranks.

    The rows of all ranks stand in the order of the step's draw, forget pairs first, so that the
    loss is the one that a single process would compute.

    Args:
        feature_loss: the objective.
        ranks: who takes part.
    """

    def __init__(self, feature_loss: FeatureLoss, ranks: Ranks) -> None:
        self._feature_loss = feature_loss
        self._ranks = ranks

    def __call__(
        self,
        image: Tensor,  # [n, D]
        text: Tensor,  # [n, D]
        scale: Tensor,  # []
        reference: Reference,
        *,
        n_forget: int,
        labels: Tensor,  # [n]
        upstream: Tensor,  # []
    ) -> FeatureGradients:
        """Return the loss over all ranks' rows and the gradients of one's own.

        The gradients of rows are multiplied by the world size, since engines average over the
        ranks; that of the scale is the same on all ranks, and stays itself.
        """
        if self._ranks.world_size == 1:
            return self._feature_loss(
                image,
                text,
                scale,
                reference,
                n_forget=n_forget,
                labels=labels,
                upstream=upstream,
            )
        counts = self._ranks.gather_numbers(n_forget, len(image))
        everyone = _Rows([(forget, total) for forget, total in counts])

        def gathered(rows: Tensor) -> Tensor:
            return everyone.in_order(self._ranks.gather_rows(rows, everyone.totals))

        ref_image, ref_text, ref_scale = reference
        found = self._feature_loss(
            gathered(image),
            gathered(text),
            scale,
            (
                None if ref_image is None else gathered(ref_image),
                None if ref_text is None else gathered(ref_text),
                ref_scale,
            ),
            n_forget=everyone.n_forget,
            labels=gathered(labels.to(image.device)).to(labels.device),
            upstream=upstream,
        )
        own = everyone.own_rows(self._ranks.rank).to(image.device)

        def kept(gradient: Tensor | None) -> Tensor | None:
            return None if gradient is None else gradient[own] * self._ranks.world_size

        # One rank speaks for all: the same sums may round differently on another processor.
        terms = torch.stack([term.double().cpu() for term in found.loss])
        loss = EraseLoss(*self._ranks.tell(terms))
        return FeatureGradients(loss, kept(found.image), kept(found.text), found.scale)


class _Rows:
    """Where the rows of each rank stand among those of all: its forget rows, its retain rows."""

    def __init__(self, counts: Sequence[tuple[int, int]]) -> None:
        self._forget = [forget for forget, _ in counts]
        self.totals = [total for _, total in counts]
        self.n_forget = sum(self._forget)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Return all rows, forget pairs first, from those of each rank."""
        halves = list(zip(parts, self._forget, strict=True))
        return torch.cat([part[:n] for part, n in halves] + [part[n:] for part, n in halves])

    def own_rows(self, rank: int) -> Tensor:
        """Return the places of a rank's rows among all."""
        forget = self._forget[rank]
        retain = self.totals[rank] - forget
        first = sum(self._forget[:rank])
        second = self.n_forget + sum(self.totals[:rank]) - first
        return torch.cat(
            [torch.arange(first, first + forget), torch.arange(second, second + retain)]
        )
