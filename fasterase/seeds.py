"""The streams of random numbers of a run, in one table so that no two ever coincide.

Every draw depends only on the run's seed, its stream and its position (step, row, ...). A resumed
run, or one with another number of workers, therefore repeats it. (Which retain pairs an automatic
run draws more often rests on the original's features; checkpoints keep them.) The bootstrap
(`evaluation/metrics.py`) and the demo's split (`demo/sets.py`) have generators of their own.
"""

from __future__ import annotations

import enum

import numpy as np


@enum.unique
class Stream(enum.IntEnum):
    """One entry per use of random numbers; the values are part of what a seed means."""

    FORGET_ORDER = 0  # permutation of the forget set, per pass
    RETAIN_ORDER = 1  # permutation of the retain set, per pass and part
    CAPTIONS = 2  # which caption of a pair, per step
    AUGMENTATION = 3  # view of a forget image, per step and position in the batch
    DATASET = 4  # global generators while a dataset with its own randomness is read, per item
    FLOOR = 5  # pairs behind the automatic floor
    DROPOUT = 6  # Dropout, per step and micro-batch
    EVALUATION = 7  # pairs that the evaluation measures
    VERDICT = 8  # pairs and rivals of the verdict
    RETAIN_POOL = 9  # retain pairs of the automatic recipe, and those withheld to measure damage
    EXAMPLES = 10  # captions and pictures of the picture sheet
    PROBE = 11  # folds of the probing attack
    LEFT_OUT = 12  # retain rows left out of batches larger than half the set, per pass and part
    PROMPT = 13  # images, words and replacements of the search for prompts
    LORA = 14  # low-rank adapters as they begin
    LATENTS = 15  # pictures of the diffusion check, per prompt and picture
    RELEARN = 16  # pairs that the relearning attack is given
    WORDS = 17  # captions whose words are compared, and the vectors of words without a meaning
    FIND = 18  # pairs in which a concept is looked for, and which of them are not trained on
    WITHHELD = 19  # pairs to forget that the automatic recipe does not train on
    PLACEBO = 20  # made-up names that show what residues mean
    MADE_UP = 21  # made-up facts beside a link, and which of them a step holds


def generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """Return the NumPy generator of one position of a stream."""
    return np.random.default_rng([seed, stream, *position])


def torch_seed(seed: int, stream: Stream, *position: int) -> int:
    """Return a 64-bit seed for PyTorch's generators at one position of a stream."""
    state = np.random.SeedSequence([seed, stream, *position]).generate_state(1, np.uint64)
    return int(state[0])
