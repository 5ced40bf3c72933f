"""The contrastive operator and the erasure objective a second time, in fp64, as they are defined.

Values come from log-softmaxes over explicit matrices and label sets, gradients from autograd
through them; nothing is shared with fasterase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

Array = NDArray[np.float64]


@dataclass
class Batch:
    """fp64 features of pairs and of their frozen originals; labels None: all different.

    Tests make it of arrays, the formulas below of tensors.
    """

    image: Any
    text: Any
    scale: Any
    ref_image: Any = None
    ref_text: Any = None
    ref_scale: Any = None
    labels: Any = None

    def leaves(self) -> Batch:
        """The same in tensors; gradients are wanted of image, text and scale."""
        given = {k: torch.tensor(np.array(v)) for k, v in vars(self).items() if v is not None}
        for name in ("image", "text", "scale"):
            given[name].requires_grad_()
        return Batch(**given)

    def rows(self, keep: slice, *, reference: bool = True) -> Batch:
        given = {k: v for k, v in vars(self).items() if reference or not k.startswith("ref_")}
        return Batch(**{k: v[keep] if np.ndim(v) else v for k, v in given.items()})


class Gradient(NamedTuple):
    image: Array
    text: Array
    scale: float

    @classmethod
    def of(cls, total: Tensor, batch: Batch) -> Gradient:
        inputs = (batch.image, batch.text, batch.scale)
        total = total + 0 * batch.scale  # a graph also where there are no pairs
        image, text, scale = torch.autograd.grad(total, inputs, materialize_grads=True)
        return cls(image.numpy(), text.numpy(), float(scale))


def log_softmax(logits: Tensor) -> Tensor:
    """Of rows; the largest term is kept out of the log, which matters for a row won by far."""
    top = logits.argmax(1, keepdim=True)
    shifted = logits - logits.gather(1, top)
    others = shifted.scatter(1, top, -torch.inf)
    return shifted - torch.log1p(others.exp().sum(1, keepdim=True))


def direction(logits: Tensor, ref_logits: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(ce [n], kl [n]) of the rows of `logits`; the KLs are 0 without a reference."""
    log_p = log_softmax(logits)
    same = labels[:, None] == labels
    ce = -(log_p * same).sum(1) / same.sum(1)
    if ref_logits is None:
        return ce, torch.zeros_like(ce)
    log_p0 = log_softmax(ref_logits)
    return ce, (log_p0.exp() * (log_p0 - log_p)).sum(1)


def square(batch: Batch) -> Tensor:
    """Losses [4, n] (ce_row, ce_col, kl_row, kl_col) of one square problem."""
    logits, ref = batch.scale * batch.image @ batch.text.T, None
    if batch.ref_image is not None:
        ref = batch.ref_scale * batch.ref_image @ batch.ref_text.T
    labels = torch.arange(len(logits)) if batch.labels is None else batch.labels
    rows = direction(logits, ref, labels)
    columns = direction(logits.T, None if ref is None else ref.T, labels)
    return torch.stack([rows[0], columns[0], rows[1], columns[1]])


@torch.enable_grad()
def contrastive(
    batch: Batch, upstream: Array, groups: tuple[int, ...] | None = None
) -> tuple[Array, Gradient]:
    """Losses [4, N] as of `square`, and the gradient of `(upstream * losses).sum()`."""
    batch = batch.leaves()
    sizes = [size for size in groups or (len(batch.image),) if size]
    ends = np.cumsum(sizes)
    parts = [square(batch.rows(slice(end - n, end))) for n, end in zip(sizes, ends, strict=True)]
    losses = torch.cat([torch.zeros(4, 0), *parts], 1)
    total = (torch.tensor(upstream) * losses).sum()
    return losses.detach().numpy(), Gradient.of(total, batch)


@torch.enable_grad()
def erase_loss(
    batch: Batch,
    *,
    n_forget: int,
    forget_weight: float = 3.0,
    retain_weight: float = 1.0,
    consistency_weight: float = 3.0,
    forget_loss: str = "similarity",
    floor: float | None = None,
    anchor_weight: float = 0.0,
    negatives: str = "own",
    cross_weight: float = 0.0,
    floor_margin: float = 0.0,
) -> tuple[dict[str, float], Gradient]:
    """The terms whose weight is not 0 (others 0) with their total, and the total's gradient."""
    batch = batch.leaves()
    nothing = torch.zeros(())
    forget, retain = (batch.rows(rows) for rows in (slice(0, n_forget), slice(n_forget, None)))

    def losses(rows: slice) -> Tensor:
        return square(batch.rows(rows)) if negatives == "own" else square(batch)[:, rows]

    values = dict.fromkeys(("forget", "retain", "consistency", "anchor"), nothing)
    if len(retain.image) and (retain_weight or consistency_weight):
        found = losses(slice(n_forget, None))
        values["retain"] = found[:2].sum(0).mean() / 2
        values["consistency"] = found[2:].sum(0).mean() if consistency_weight else nothing
    if n_forget and forget_weight and forget_loss == "contrastive":
        values["forget"] = -losses(slice(0, n_forget))[:2].sum(0).mean() / 2
    if n_forget and forget_loss == "similarity":
        for weight, image, text in (
            (1.0, forget.image, forget.text),
            (cross_weight, forget.image, forget.ref_text),
            (cross_weight, forget.ref_image, forget.text),
        ):
            if weight:
                cosines = (image * text).sum(1)
                above = cosines if floor is None else (cosines - floor - floor_margin).relu()
                values["forget"] = values["forget"] + weight * above.mean()
                if cross_weight and floor is not None:
                    values["forget"] = values["forget"] + weight * (floor - cosines.mean()).relu()
        if cross_weight and floor is not None and len(retain.image):
            for now, others in ((forget.image, retain.ref_text), (forget.text, retain.ref_image)):
                strays = now @ others.mean(0) - floor
                loss = smooth_l1_loss(strays, torch.zeros_like(strays), beta=0.05)
                values["forget"] = values["forget"] + cross_weight * loss
    if anchor_weight and len(retain.image):
        moved = [retain.image - retain.ref_image, retain.text - retain.ref_text]
        values["anchor"] = sum(each.square().sum(1).mean() for each in moved)
    values["total"] = (
        forget_weight * values["forget"]
        + retain_weight * values["retain"]
        + consistency_weight * values["consistency"]
        + anchor_weight * values["anchor"]
    )
    gradient = Gradient.of(values["total"], batch)
    return {name: value.item() for name, value in values.items()}, gradient


def unit_rows(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clip_like(
    n: int,
    width: int,
    scale: float,
    *,
    seed: int = 0,
    ref_width: int | None = None,
    num_labels: int | None = None,
    modality_gap: float = 0.0,
) -> Batch:
    """Matched pairs with noise; with a gap, images in one cone and texts in the opposite one."""
    random = np.random.default_rng(seed)
    concept = random.normal(size=(n, width))
    cone = modality_gap * np.sqrt(width) * unit_rows(random.normal(size=(1, width)))
    image = unit_rows(concept + cone + 0.5 * random.normal(size=(n, width)))
    text = unit_rows(concept - cone + 0.5 * random.normal(size=(n, width)))
    if ref_width is None or ref_width == width:
        ref_image = unit_rows(image + 0.3 * unit_rows(random.normal(size=(n, width))))
        ref_text = unit_rows(text + 0.3 * unit_rows(random.normal(size=(n, width))))
    else:
        ref_image = unit_rows(random.normal(size=(n, ref_width)))
        ref_text = unit_rows(ref_image + 0.7 * unit_rows(random.normal(size=(n, ref_width))))
    labels = None if num_labels is None else random.integers(0, num_labels, size=n)
    return Batch(image, text, scale, ref_image, ref_text, 20.0, labels)
