"""Cross-tower recovery: is the concept gone from both towers, or only from their agreement?

An eraser that moves one tower leaves the concept in the other: whoever still has the original's
other tower finds it again.
"""

from __future__ import annotations

from dataclasses import replace

from fasterase.errors import InputError
from fasterase.evaluation.findings import Examined, Target


def swap(target: Target) -> Examined:
    """Judge the original's images with the model's texts, and the original's texts with its images.

    Residues and hit@1 as in the verdict; unrelated pairs are swapped in the same way. Costs one
    judging per direction on features that were computed anyway; no model runs.

    Raises:
        InputError: the model's features have another width than the original's. A reference of
            another width gets no findings.
    """
    original, judge = target.original, target.evaluator.judge
    assert original is not None
    width, before = (each["retain"].image.shape[1] for each in (target.features, original))
    if width != before:
        if target.name != "model":
            return Examined([])
        raise InputError(
            f"attacks: 'swap' compares one model's images with the other's texts, but features of "
            f"the model have {width} numbers and those of the original {before}. Leave 'swap' out."
        )
    findings, own = [], target.features
    for key, group, images, texts in (
        ("original_images", "the original's images with the model's texts", original, own),
        ("original_texts", "the model's images with the original's texts", own, original),
    ):
        mixed = {name: replace(texts[name], image=images[name].image) for name in judge.rows}
        findings += target.traces(judge.judge(mixed), key=key, group=group)
    return Examined(findings)
