"""What the tables show of each attack: figures that should be low, or near a retrained model's."""

from __future__ import annotations

from typing import NamedTuple


class Attacked(NamedTuple):
    """A figure of an attack, and the title of its column."""

    attack: str
    key: str
    title: str


SWAPPED = (
    Attacked("swap", "forget/original_images/contest_hit@1", "its texts, original's images: hit@1"),
    Attacked("swap", "forget/original_texts/contest_hit@1", "its images, original's texts: hit@1"),
)
PROBED = (Attacked("probe", "forget/linear_probe/auc", "probe AUC"),)
RELEARNED = (
    Attacked("relearn", "forget/area/residue", "relearned residue"),
    Attacked("relearn", "forget/area/contest_hit@1", "relearned hit@1"),
)
MEMBERSHIP = (Attacked("membership", "forget/cosine/auc", "membership AUC"),)


def attacks_of(figures: tuple[Attacked, ...]) -> tuple[str, ...]:
    """Return the names of the attacks behind some figures, each once."""
    return tuple(dict.fromkeys(each.attack for each in figures))
