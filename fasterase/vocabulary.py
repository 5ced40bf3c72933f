"""Words: how frequent they are at large, and a list of everyday things.

A retain set is a sample of what a model should keep. Whatever is not in it, these lists stand for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from importlib.resources import files

# Letters in a row, with hyphens and apostrophes apart: "snow-capped" are two words.
_WORD = re.compile(r"[^\W\d_]+")
# The share of different words in captions that a language's list should know.
KNOWN_SHARE = 0.5


def words_of(text: str) -> list[str]:
    """Return the words of a text as they stand there; digits and punctuation are none."""
    return _WORD.findall(text)


@functools.cache
def english_frequencies() -> Mapping[str, float]:
    """Return word -> log10 of its occurrences in a billion words of English.

    Words that occur less often than once in a million are not listed.
    """
    found = {}
    for line in _read("english.tsv").splitlines():
        level, words = line.split("\t")
        found.update(dict.fromkeys(words.split(), float(level)))
    return found


@functools.cache
def everyday_things() -> tuple[str, ...]:
    """Return 2,000 names of things and short phrases, sorted."""
    return tuple(_read("everyday.txt").splitlines())


def frequencies_for(words: Collection[str]) -> Mapping[str, float] | None:
    """Return word frequencies of the language that most of `words` (lower case) belong to.

    English needs nothing. Other languages need the package wordfreq (extra `languages`). None if
    no list at hand knows half of the words.
    """
    known = english_frequencies()
    if _share(words, known) >= KNOWN_SHARE:
        return known
    try:
        import wordfreq
    except ImportError:
        return None
    lists = (
        {word: wordfreq.zipf_frequency(word, language) for word in words}
        for language in wordfreq.available_languages("small")
    )
    best = max(lists, key=lambda each: sum(map(bool, each.values())))
    found = {word: frequency for word, frequency in best.items() if frequency}
    return found if _share(words, found) >= KNOWN_SHARE else None


def _share(words: Collection[str], known: Collection[str]) -> float:
    return sum(word in known for word in words) / max(len(words), 1)


def _read(name: str) -> str:
    return (files("fasterase") / "word_lists" / name).read_text(encoding="utf-8")
