"""What an attack is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Target:
    """A model under attack.

    Attributes:
        name: `"model"`, `"original"` or the name of a reference.
        encoder: the model. An attack that changes it puts it back as it was.
        features: set -> its features of the measured pairs.
        original: the same of the original; None if it is not among the models.
        non_members: the model's features of pairs that no model was trained on; None without any.
        original_non_members: the same of the original.
        evaluator: the pairs, and the judge of the sets to forget.
    """

    name: str
    encoder: PairEncoder
    features: Mapping[str, PairFeatures]
    original: Mapping[str, PairFeatures] | None
    non_members: PairFeatures | None
    original_non_members: PairFeatures | None
    evaluator: Evaluator
