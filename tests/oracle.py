"""The contrastive operator and the erasure objective a second time: numpy, fp64, one row at a time.

Values come from log-sum-exps over explicit rows and label sets, gradients from the softmax formulas
written out as full matrices; nothing is shared with fasterase. `tests/test_oracle.py` holds the
gradients against finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Batch:
    """fp64 features of pairs and of their frozen originals; labels None: all different."""

    image: Array
    text: Array
    scale: float
    ref_image: Array | None = None
    ref_text: Array | None = None
    ref_scale: float | None = None
    labels: Array | None = None

    def rows(self, keep: slice, *, reference: bool = True) -> Batch:
        has_ref = reference and self.ref_image is not None
        return Batch(
            self.image[keep],
            self.text[keep],
            self.scale,
            self.ref_image[keep] if has_ref else None,
            self.ref_text[keep] if has_ref else None,
            self.ref_scale if has_ref else None,
            None if self.labels is None else self.labels[keep],
        )


@dataclass
class Gradient:
    image: Array
    text: Array
    scale: float

    @classmethod
    def zero(cls, batch: Batch) -> Gradient:
        return cls(np.zeros_like(batch.image), np.zeros_like(batch.text), 0.0)

    def add(self, keep: slice, other: Gradient) -> None:
        self.image[keep] += other.image
        self.text[keep] += other.text
        self.scale += other.scale


def log_softmax(logits: Array) -> Array:
    """Of one row; the largest term is kept out of the log, which matters for a row won by far."""
    top = int(np.argmax(logits))
    others = np.delete(logits, top) - logits[top]
    return logits - logits[top] - np.log1p(np.exp(others).sum())


def direction(logits: Array, ref_logits: Array | None, labels: Array) -> tuple[Array, ...]:
    """(ce [n], d ce_i / d s_i. [n, n], kl [n], d kl_i / d s_i. [n, n]) of the rows of `logits`."""
    n = len(logits)
    ce, d_ce = np.zeros(n), np.zeros((n, n))
    kl, d_kl = np.zeros(n), np.zeros((n, n))
    for i, row in enumerate(logits):
        log_p = log_softmax(row)
        same = np.flatnonzero(labels == labels[i])
        ce[i] = -log_p[same].mean()
        d_ce[i] = np.exp(log_p)
        d_ce[i, same] -= 1.0 / len(same)
        if ref_logits is not None:
            log_p0 = log_softmax(ref_logits[i])
            kl[i] = (np.exp(log_p0) * (log_p0 - log_p)).sum()
            d_kl[i] = np.exp(log_p) - np.exp(log_p0)
    return ce, d_ce, kl, d_kl


def contrastive(
    batch: Batch, upstream: Array, groups: tuple[int, ...] | None = None
) -> tuple[Array, Gradient]:
    """Losses [4, N] (ce_row, ce_col, kl_row, kl_col), gradient of `(upstream * losses).sum()`.

    Without a reference the KLs are 0.
    """
    total = len(batch.image)
    losses, gradient = np.zeros((4, total)), Gradient.zero(batch)
    start = 0
    for n in groups or (total,):
        keep = slice(start, start + n)
        start += n
        part = batch.rows(keep)
        losses[:, keep], part_gradient = _square(part, upstream[:, keep])
        gradient.add(keep, part_gradient)
    return losses, gradient


def _square(batch: Batch, upstream: Array) -> tuple[Array, Gradient]:
    cosine = batch.image @ batch.text.T
    ref = None
    if batch.ref_image is not None:
        ref = batch.ref_scale * (batch.ref_image @ batch.ref_text.T)
    labels = np.arange(len(cosine)) if batch.labels is None else batch.labels
    logits = batch.scale * cosine
    ce_row, d_ce_row, kl_row, d_kl_row = direction(logits, ref, labels)
    ce_col, d_ce_col, kl_col, d_kl_col = direction(logits.T, None if ref is None else ref.T, labels)
    up = upstream[..., None]
    d_logits = up[0] * d_ce_row + up[2] * d_kl_row + (up[1] * d_ce_col + up[3] * d_kl_col).T
    gradient = Gradient(
        batch.scale * d_logits @ batch.text,
        batch.scale * d_logits.T @ batch.image,
        float((d_logits * cosine).sum()),
    )
    return np.stack([ce_row, ce_col, kl_row, kl_col]), gradient


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
) -> tuple[dict[str, float], Gradient]:
    """The terms whose weight is not 0 (others 0) with their total, and the total's gradient."""
    total = len(batch.image)
    sets = {"forget": slice(0, n_forget), "retain": slice(n_forget, total)}
    sizes = {name: max(rows.stop - rows.start, 1) for name, rows in sets.items()}
    upstream = {name: np.zeros((4, total)) for name in sets}
    if forget_loss == "contrastive":
        upstream["forget"][:2, sets["forget"]] = -forget_weight / 2 / sizes["forget"]
    upstream["retain"][:2, sets["retain"]] = retain_weight / 2 / sizes["retain"]
    upstream["retain"][2:, sets["retain"]] = consistency_weight / sizes["retain"]

    values = dict.fromkeys(("forget", "retain", "consistency", "anchor"), 0.0)
    gradient = Gradient.zero(batch)
    for name, rows in sets.items():
        if rows.stop == rows.start or not upstream[name].any():
            continue
        where = rows if negatives == "own" else slice(0, total)
        losses, part = contrastive(batch.rows(where), upstream[name][:, where])
        gradient.add(where, part)
        own = losses if negatives == "own" else losses[:, rows]
        if name == "forget":
            values["forget"] = -own[:2].sum(0).mean() / 2
        else:
            values["retain"] = own[:2].sum(0).mean() / 2
            values["consistency"] = own[2:].sum(0).mean() if consistency_weight else 0.0
    if forget_loss == "similarity" and n_forget:
        for weight, image, text, d_image, d_text in (
            (1.0, batch.image, batch.text, gradient.image, gradient.text),
            (cross_weight, batch.image, batch.ref_text, gradient.image, None),
            (cross_weight, batch.ref_image, batch.text, None, gradient.text),
        ):
            if weight:
                cosines = [float(image[i] @ text[i]) for i in range(n_forget)]
                pulls = int(cross_weight and floor is not None and np.mean(cosines) < floor)
                values["forget"] += weight * pulls * ((floor or 0.0) - np.mean(cosines))
                for i, cosine in enumerate(cosines):
                    is_above = int(floor is None or cosine > floor)
                    values["forget"] += weight * is_above * (cosine - (floor or 0.0)) / n_forget
                    share = weight * (is_above - pulls) * forget_weight / n_forget
                    if d_image is not None:
                        d_image[i] += share * text[i]
                    if d_text is not None:
                        d_text[i] += share * image[i]
        for now, others, grad in (
            (batch.image, batch.ref_text, gradient.image),
            (batch.text, batch.ref_image, gradient.text),
        ):
            if cross_weight and floor is not None and n_forget < total:
                mean = sum(others[j] for j in range(n_forget, total)) / sizes["retain"]
                for i in range(n_forget):
                    stray = float(now[i] @ mean) - floor
                    is_small = abs(stray) < 0.05
                    loss = stray**2 / 0.1 if is_small else abs(stray) - 0.025
                    slope = stray / 0.05 if is_small else np.sign(stray)
                    values["forget"] += cross_weight * loss / n_forget
                    grad[i] += forget_weight * cross_weight * slope * mean / n_forget
    if anchor_weight:
        for i in range(n_forget, total):
            for now, ref, grad in (
                (batch.image, batch.ref_image, gradient.image),
                (batch.text, batch.ref_text, gradient.text),
            ):
                moved = now[i] - ref[i]
                values["anchor"] += float(moved @ moved) / sizes["retain"]
                grad[i] += 2 * anchor_weight / sizes["retain"] * moved
    values["total"] = (
        forget_weight * values["forget"]
        + retain_weight * values["retain"]
        + consistency_weight * values["consistency"]
        + anchor_weight * values["anchor"]
    )
    return values, gradient


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
