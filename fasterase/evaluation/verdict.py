"""Whether a concept is forgotten: what is left of it, and the verdict from that.

No threshold on a cosine could serve two models: their scales differ. Verdicts rest on ranks of the
concept's own pairs among unrelated captions and images (see `judge`), where 0.5 means that nothing
is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORGOTTEN, REMEMBERED = "forgotten", "remembered"
OVER_ERASED, NEVER_KNOWN = "over-erased", "never known"
# The worst first: a result of several sets is the worst of theirs.
PRECEDENCE = (REMEMBERED, OVER_ERASED, FORGOTTEN, NEVER_KNOWN)

# Models retrained without a concept have residues of .60 to .70: they still know that an apple is
# food and red. Above this a direction counts as known.
REMEMBERED_RESIDUE = 0.75
# As far below "no trace" (0.5) as the other threshold is above it: loudly absent.
OVER_ERASED_RESIDUE = 0.25
# Hit rates that chance and a few lucky images explain.
HARMLESS_HIT = 0.10
# Forget images below which a verdict shows little.
FEW_IMAGES = 20


@dataclass(frozen=True)
class Trace:
    """What is left of a set to forget.

    Attributes:
        image_to_text: mean over pairs of the share of unrelated captions that are less similar to
            the image than its own caption: 1 is known, 0.5 no trace, 0 loudly absent.
        text_to_image: the same of unrelated images and the caption.
        hit: share of images won by a caption of the set in a contest with the unrelated captions.
        hit_low, hit_high: 95 % Wilson interval of `hit`.
        chance: share that a random order would give.
        pairs: number of pairs judged.
    """

    image_to_text: float
    text_to_image: float
    hit: float
    hit_low: float
    hit_high: float
    chance: float
    pairs: int

    @property
    def residue(self) -> float:
        """Mean of both directions."""
        return (self.image_to_text + self.text_to_image) / 2

    @property
    def is_remembered(self) -> bool:
        return max(
            self.image_to_text, self.text_to_image
        ) > REMEMBERED_RESIDUE or self.hit_low > max(HARMLESS_HIT, 2 * self.chance)

    @property
    def is_over_erased(self) -> bool:
        return min(self.image_to_text, self.text_to_image) < OVER_ERASED_RESIDUE

    def describe(self) -> str:
        """Describe the figures in one line."""
        return (
            f"residue {self.image_to_text:.2f} image->text, {self.text_to_image:.2f} text->image "
            f"(1 known, 0.5 no trace, 0 loudly absent); hit@1 {100 * self.hit:.0f} % "
            f"(chance {100 * self.chance:.0f} %) of {self.pairs} images"
        )


def decide(traces: Mapping[str, Trace], original: Mapping[str, Trace] | None = None) -> str | None:
    """Return the verdict on a model: the worst over its sets to forget.

    Args:
        traces: set -> trace of the model.
        original: set -> trace of the model before erasing; a set that it does not remember was
            never known. None if the original was not measured.

    Returns:
        `"remembered"`, `"over-erased"`, `"forgotten"` or `"never known"`; None without traces.
    """
    verdicts = decide_each(traces, original).values()
    return next((verdict for verdict in PRECEDENCE if verdict in verdicts), None)


def decide_each(
    traces: Mapping[str, Trace], original: Mapping[str, Trace] | None = None
) -> dict[str, str]:
    """Return set -> verdict of each set alone; see `decide`."""

    def of(name: str, trace: Trace) -> str:
        if original is not None and not original[name].is_remembered:
            return NEVER_KNOWN
        if trace.is_remembered:
            return REMEMBERED
        return OVER_ERASED if trace.is_over_erased else FORGOTTEN

    return {name: of(name, trace) for name, trace in traces.items()}


def describe_verdict(verdict: str, traces: Mapping[str, Trace]) -> str:
    """Return the verdict with the figures of each set, one line per set."""
    lines = [f"{name}: {trace.describe()}" for name, trace in traces.items()]
    return "\n".join([f"verdict: {verdict}", *lines])
