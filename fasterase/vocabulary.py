"""Words: how frequent they are at large, and a list of everyday things.

A retain set is a sample of what a model should keep. Whatever is not in it, these lists stand for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.resources import files

# What tokenizers that know the words of their own data alone raise for others.
UNREADABLE = (LookupError, TypeError, ValueError)
# Words that English uses more than 400 times in a million (log10 in a billion) are about nothing.
GRAMMAR = 5.6
# Letters in a row, with hyphens and apostrophes apart: "snow-capped" are two words.
_WORD = re.compile(r"[^\W\d_]+")
# Or digits in a row, as many as say whose they are: a part of a telephone number, not "2 dogs".
_TERM = re.compile(rf"{_WORD.pattern}|\d{{3,}}")
# Scripts without spaces (Thai, Lao, Burmese, Khmer, Chinese, Japanese): whole phrases look like
# words there.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def words_of(text: str) -> list[str]:
    """Return the words of a text as they stand there; digits and punctuation are none."""
    return _WORD.findall(text)


def terms_of(text: str) -> list[str]:
    """Return the words of a text, and its numbers of three digits or more."""
    return _TERM.findall(text)


def replace_terms(text: str, others: Mapping[str, str]) -> str:
    """Return a text with others in place of some of its terms, which are given in lower case."""
    return _TERM.sub(lambda found: others.get(found[0].lower(), found[0]), text)


def parts_of(word: str) -> set[str]:
    """Return its letters in threes, first and last ones marked: words with none share no token."""
    marked = f" {word} "
    return {marked[start : start + 3] for start in range(len(marked) - 2)}


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
def english_by_part() -> Mapping[str, list[str]]:
    """Return part (`parts_of`) -> words of `english_frequencies` that have it."""
    found: dict[str, list[str]] = {}
    for word in english_frequencies():
        for part in parts_of(word):
            found.setdefault(part, []).append(word)
    return found


@functools.cache
def everyday_things() -> tuple[str, ...]:
    """Return 2,000 names of things and short phrases, sorted."""
    return tuple(_read("everyday.txt").splitlines())


def _read(name: str) -> str:
    return (files("fasterase") / "word_lists" / name).read_text(encoding="utf-8")
