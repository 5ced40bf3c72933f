"""Cross-tower recovery: is the concept gone from both towers, or only from their agreement?

An eraser that moves one tower leaves the concept in the other: whoever still has the original's
other tower finds it again.
"""

from __future__ import annotations

from dataclasses import replace

from fasterase.errors import InputError
from fasterase.evaluation.figures import Found, trace_figures
from fasterase.evaluation.target import Target


def swap(target: Target) -> Found:
    """Judge the original's images with the model's texts, and the original's texts with its images.

    Residues and hit@1 as in the verdict; unrelated pairs are swapped in the same way. Costs one
    judging per direction on features that were computed anyway; no model runs.

    Raises:
        InputError: the model's features have another width than the original's. A reference of
            another width gets no figures.
    """
    original = target.original
    assert original is not None
    width, before = (each["retain"].image.shape[1] for each in (target.features, original))
    if width != before:
        if target.name != "model":
            return Found([])
        raise InputError(
            f"attacks: 'swap' compares one model's images with the other's texts, but features of "
            f"the model have {width} numbers and those of the original {before}. Leave 'swap' out."
        )
    names = target.evaluator.judge.rows
    images = {n: replace(target.features[n], image=original[n].image) for n in names}
    texts = {n: replace(original[n], image=target.features[n].image) for n in names}
    figures = []
    for key, group, mixed in (
        ("original_images", "the original's images with the model's texts", images),
        ("original_texts", "the model's images with the original's texts", texts),
    ):
        figures += trace_figures(
            target.evaluator.judge.judge(mixed),
            key=key,
            group=group,
            resamples=target.evaluator.resamples,
            seed=target.evaluator.seed,
        )
    return Found(figures)
