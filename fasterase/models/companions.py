"""The tokenizer and the preprocessing that go with a model, and how they stay with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# On the library's own module. The underscores keep it out of state dicts and saved configurations.
_ATTRIBUTE = "_fasterase_companions"


@dataclass(frozen=True)
class Companions:
    """What reads captions and pictures for a model, as its library or the caller gives it.

    Attributes:
        tokenizer: takes part as `tokenizer=`; None when unknown.
        preprocess: takes part as `preprocess=`; None when unknown.
    """

    tokenizer: Any = None
    preprocess: Any = None

    @classmethod
    def from_arguments(cls, tokenizer: Any, preprocess: Any) -> Companions:
        """Take transformers processors apart: either argument gives the other where that is None.

        Args:
            tokenizer, preprocess: the caller's; a processor such as `CLIPProcessor` holds both.
        """
        if _is_processor(tokenizer):
            preprocess = tokenizer if preprocess is None else preprocess
            tokenizer = tokenizer.tokenizer
        if _is_processor(preprocess):
            tokenizer = preprocess.tokenizer if tokenizer is None else tokenizer
            preprocess = preprocess.image_processor
        return cls(tokenizer, preprocess)

    def or_else(self, other: Companions) -> Companions:
        """Return these, and those of `other` where one is unknown."""
        return Companions(
            other.tokenizer if self.tokenizer is None else self.tokenizer,
            other.preprocess if self.preprocess is None else self.preprocess,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Companions:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A pickled model must be readable without fasterase, and a caller's function may not be
        # picklable: None takes this place.
        return type(None), ()


def remember(module: nn.Module, companions: Companions) -> None:
    """Keep them on the module, so that they are found when it is passed in again, or a copy."""
    setattr(module, _ATTRIBUTE, companions)


def remembered(module: nn.Module) -> Companions:
    """Return what `remember` kept on the module; nothing known otherwise."""
    return getattr(module, _ATTRIBUTE, None) or Companions()


def _is_processor(candidate: Any) -> bool:
    return hasattr(candidate, "image_processor") and hasattr(candidate, "tokenizer")
