"""The loss of a step over the pairs of all ranks, and its gradients with respect to one's own.

The features are gathered without a graph and every rank computes the whole loss: at a batch of 32k
that is a thousandth of what the towers of ViT-bigG compute. Each rank keeps the gradients of its
own rows, so that no collective is differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.engine.job import Job
from fasterase.engine.optim import Trained
from fasterase.objective import (
    EraseLoss,
    ForgetGroup,
    Objective,
    Strangers,
    moved_distance,
    weighted_erase_loss,
)
from fasterase.original.features import Original, Unmatched
from fasterase.pairs.batches import StepBatch
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.transfers import to_device

# CLIP's own ceiling of the scale (Radford et al., 2021, section 2.5).
MAX_SCALE = 100.0
# How far above the floor a pair rests, in standard deviations of unrelated cosines. To retrained
# models a concept they never saw is a little nearer than what is unrelated, for it is like others.
FLOOR_MARGIN = 0.15


def loss_products(precision: str) -> str:
    """Return how the loss multiplies features where the towers run in `precision` (resolved).

    fp16 for bf16 towers too: of unit rows it keeps eight times bf16's precision at the same speed.
    """
    return "fp32" if precision == "fp32" else "fp16"


class FeatureGradients(NamedTuple):
    """The loss of a step, detached, and the gradients of its total.

    They are None for what is not trained, and if the total does not depend on it. If a term of the
    loss is not finite they are NaN, so that no engine takes the step, and nothing has to be read.
    """

    loss: EraseLoss
    image: Tensor | None  # [n, D]
    text: Tensor | None  # [n, D]
    scale: Tensor | None  # []


class StepPairs(NamedTuple):
    """What the loss needs of some pairs beside their features; the forget pairs come first."""

    n_forget: int
    labels: Tensor  # [n] equal for equal captions; on the CPU, where the operator can look at them
    ref_image: Tensor | None  # [n, D0] the original's; None if not used
    ref_text: Tensor | None  # [n, D0]
    ref_scale: Tensor | None  # []
    concepts: Tensor | None = None  # [n] the number of each pair's concept, of several; on the CPU
    weights: Sequence[float] = ()  # one for each concept


@dataclass(frozen=True)
class StepLoss:
    """Computes the loss of a step from features, and its gradients, without touching the towers.

    The rows of all ranks stand in the order of the step's draw, forget pairs first, so that the
    loss is the one that a single process would compute.
    """

    objective: Objective
    image_trained: bool = True  # whether its gradient is needed
    text_trained: bool = True
    scale_trained: bool = True
    # Of several concepts, and of links, what each is to end at; a step gives them rows and weights.
    groups: Sequence[ForgetGroup] = ()
    concepts: Mapping[str, range] = field(default_factory=dict)  # their rows of the forget set
    original: Original | None = None  # None if no loss uses its features
    # A trained scale is clamped inside the loss. Clamping the weight would be lost in optimisers
    # that have master weights of their own.
    max_scale: float = MAX_SCALE
    # Report how far retained features have moved also where the anchor has no weight.
    measures_distance: bool = False
    ranks: Ranks = ALONE

    @classmethod
    def of_job(
        cls,
        job: Job,
        trained: Trained,
        *,
        floors: Sequence[Unmatched],
        strangers: Sequence[Strangers] = (),
        original: Original | None = None,
    ) -> StepLoss:
        """Return the loss of a run; automatic floors rest on the `floors` of its concepts.

        `strangers` are what links end at in place of a floor, for each concept.
        """
        config = job.config
        groups = [
            ForgetGroup(floor=each.mean, floor_margin=FLOOR_MARGIN * each.deviation)
            if config.floor == "auto"
            else ForgetGroup(floor=config.floor)
            for each in floors
        ]
        objective = Objective(
            forget_weight=config.forget_weight,
            retain_weight=config.retain_weight,
            consistency_weight=config.consistency_weight,
            forget_loss=config.forget_loss,
            floor=groups[0].floor if config.forget_loss == "similarity" else None,
            anchor_weight=config.anchor_weight,
            negatives=config.negatives,
            backend=config.backend,
            products=loss_products(job.precision),
            cross_weight=config.used_cross_weight,
            floor_margin=groups[0].floor_margin,
        )
        if strangers:
            pairs = zip(groups, strangers, strict=True)
            groups = [group._replace(strangers=theirs) for group, theirs in pairs]
        return cls(
            objective,
            image_trained=trained.image,
            text_trained=trained.text,
            scale_trained=trained.scale,
            groups=groups if job.concepts or strangers else (),
            concepts=job.concepts or {"forget": range(len(job.forget))},
            original=original,
            max_scale=max(MAX_SCALE, float(job.model.scale().detach())),
            measures_distance=config.lr == "auto" and not config.anchor_weight,
            ranks=job.ranks,
        )

    def pairs(self, batch: StepBatch, weights: Mapping[str, float]) -> StepPairs:
        """Return what is known of a batch's pairs; `weights` are those of several concepts."""
        ref_image = ref_text = ref_scale = concepts = None
        if self.original is not None:
            ref_image, ref_text = self.original.features(batch)
            ref_scale = self.original.scale
        if self.groups:
            stops = [rows.stop for rows in self.concepts.values()]
            numbers = np.zeros(len(batch.ids), np.int64)
            numbers[: batch.n_forget] = np.searchsorted(stops, batch.forget_rows, side="right")
            concepts = torch.from_numpy(numbers)
        known = [weights.get(name, 1.0) for name in self.concepts]
        return StepPairs(
            batch.n_forget, batch.labels, ref_image, ref_text, ref_scale, concepts, known
        )

    def __call__(
        self,
        image: Tensor,  # [n, D]
        text: Tensor,  # [n, D]
        scale: Tensor,  # [] exp(logit_scale)
        pairs: StepPairs,
        upstream: Tensor,  # [] the scaling of the loss in fp16, else 1
    ) -> FeatureGradients:
        """Return the loss over all ranks' rows, and one's own gradients of `upstream * total`.

        The gradients of rows are multiplied by the world size, since engines average over the
        ranks; that of the scale is the same on all ranks, and stays itself.
        """
        if self.ranks.world_size == 1:
            return self._compute(image, text, scale, pairs, upstream)
        image, text, pairs, own = self._gather(image, text, pairs)
        computed = self._compute(image, text, scale, pairs, upstream)
        image_gradient, text_gradient = (
            None if gradient is None else gradient[own] * self.ranks.world_size
            for gradient in (computed.image, computed.text)
        )
        return computed._replace(image=image_gradient, text=text_gradient)

    def _gather(
        self, image: Tensor, text: Tensor, pairs: StepPairs
    ) -> tuple[Tensor, Tensor, StepPairs, Tensor]:
        """Return features and pairs of all ranks in the order of the draw, and one's own places."""
        ranks = self.ranks
        concepts = None if pairs.concepts is None else pairs.concepts.numpy()
        found = ranks.gather_objects((pairs.n_forget, pairs.labels.numpy(), concepts))
        n_forget, labels, numbers = zip(*found, strict=True)
        counts = [len(those) for those in labels]
        is_retain = [torch.arange(n) >= k for n, k in zip(counts, n_forget, strict=True)]
        order = torch.cat(is_retain).argsort(stable=True)  # those of the first rank first
        owner = torch.arange(ranks.world_size).repeat_interleave(torch.tensor(counts))
        own = to_device((owner[order] == ranks.rank).nonzero().flatten(), image.device)
        order_there = to_device(order, image.device)

        def gathered(rows: Tensor) -> Tensor:
            return torch.cat(ranks.gather_rows(rows, counts))[order_there]

        def joined(parts: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts))[order]

        of_all = pairs._replace(
            n_forget=sum(n_forget),
            labels=joined(labels),
            ref_image=None if pairs.ref_image is None else gathered(pairs.ref_image),
            ref_text=None if pairs.ref_text is None else gathered(pairs.ref_text),
            concepts=None if concepts is None else joined(numbers),
        )
        return gathered(image), gathered(text), of_all, own

    def _compute(
        self, image: Tensor, text: Tensor, scale: Tensor, pairs: StepPairs, upstream: Tensor
    ) -> FeatureGradients:
        """Return the loss over all given rows, and its gradients."""
        trained = (self.image_trained, self.text_trained, self.scale_trained)
        leaves = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip((image, text, scale), trained, strict=True)
        ]
        clamped = leaves[2].clamp(max=self.max_scale) if self.scale_trained else leaves[2]
        ref_image, ref_text = pairs.ref_image, pairs.ref_text
        with torch.enable_grad():
            loss = weighted_erase_loss(
                leaves[0],
                leaves[1],
                clamped,
                ref_image,
                ref_text,
                pairs.ref_scale,
                self.objective,
                n_forget=pairs.n_forget,
                labels=pairs.labels,
                groups=self._present_groups(pairs, image.device),
            )
        detached = EraseLoss(*(term.detach() for term in loss))
        if self.measures_distance and pairs.n_forget < len(image) and ref_image is not None:
            assert ref_text is not None
            features = (image.detach(), text.detach(), ref_image, ref_text)
            moved = moved_distance(*(each[pairs.n_forget :] for each in features))
            detached = detached._replace(anchor=moved)
        if not loss.total.requires_grad:
            return FeatureGradients(detached, None, None, None)
        is_finite = torch.stack(detached).isfinite().all()
        upstream = torch.where(is_finite, upstream, torch.nan)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        computed = iter(torch.autograd.grad(loss.total, needed, upstream, allow_unused=True))
        gradients = [next(computed) if leaf.requires_grad else None for leaf in leaves]
        return FeatureGradients(detached, *gradients)

    def _present_groups(self, pairs: StepPairs, device: torch.device) -> list[ForgetGroup]:
        """Return the groups that have forget rows in the step, with these and their weights."""
        if pairs.concepts is None:
            return []
        numbers = pairs.concepts[: pairs.n_forget]
        present = sorted(set(numbers.tolist()))
        total = sum(pairs.weights[number] for number in present)
        return [
            self.groups[number]._replace(
                rows=to_device((numbers == number).nonzero().flatten(), device),
                weight=pairs.weights[number] / total,
            )
            for number in present
        ]
