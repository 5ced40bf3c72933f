"""Paraphrases: do other wordings of a pair still, or no longer, belong to its image?"""

from __future__ import annotations

import numpy as np
import torch

from fasterase.errors import InputError
from fasterase.evaluation.figures import Found, share_below
from fasterase.evaluation.target import Target
from fasterase.evaluation.tasks.retrieve import encode_captions


def paraphrases(target: Target) -> Found:
    """Return the residue of the second and further captions of each pair, in both directions.

    image->text is the share of unrelated captions that are less similar to the image than the
    paraphrase, text->image that of unrelated images and the paraphrase: 1 known, 0.5 no trace.
    Unrelated are the pairs that the verdict compares with. A pair's value is the mean over its
    further captions. On sets to keep it should not fall. Costs all captions through the text tower.

    Raises:
        InputError: no pair has a second caption.
    """
    judge = target.evaluator.judge
    if not judge.rows:
        raise InputError(
            "tasks: 'paraphrases': every caption of `retain` is also one to forget, so there is "
            "nothing to compare with. Give retain pairs with other captions."
        )
    unrelated = target.features["retain"].at(judge.rows["retain"])
    others = unrelated.text[sorted({those[0] for those in unrelated.pair_text})]
    figures = []
    for name in target.evaluator.sources:
        captions, text = encode_captions(target, name)
        distinct = dict.fromkeys(caption for those in captions for caption in those)
        place = {caption: i for i, caption in enumerate(distinct)}
        further = [(row, place[c]) for row, those in enumerate(captions) for c in those[1:]]
        if not further:
            continue
        rows, columns = (torch.tensor(those) for those in zip(*further, strict=True))
        images, texts = target.features[name].image[rows], text[columns]
        matched = (images * texts).sum(1)
        count = np.bincount(rows.numpy(), minlength=len(captions))
        for key, title, similarity in (
            ("image_to_text", "image->text", images @ others.T),
            ("text_to_image", "text->image", texts @ unrelated.image.T),
        ):
            below = share_below(matched.double().numpy(), similarity.double().numpy())
            total = np.bincount(rows.numpy(), weights=below, minlength=len(captions))
            with np.errstate(invalid="ignore"):  # pairs without a paraphrase have no value
                values = total / count
            figures.append(
                target.mean_figure(
                    name,
                    values,
                    key=f"{key}_residue",
                    title=f"{title} residue of paraphrases, %",
                    chance=0.5,
                    aim=" chance",
                )
            )
    if not figures:
        raise InputError(
            "tasks: 'paraphrases' measures the second and further captions of pairs, and no pair "
            "has any. Give lists of captions, or leave 'paraphrases' out."
        )
    return Found(figures)
