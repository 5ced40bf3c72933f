"""Make the word lists that fasterase ships: how frequent English words are, and everyday things.

    pip install 'wordfreq>=3.1,<4' lemminflect
    python -m tools.vocabulary [--output fasterase/word_lists]

`english.tsv` holds the words that occur once in a million or more often, one line per tenth of a
decade: log10 of the occurrences in a billion words (the "Zipf" value), a tab, the words.
`everyday.txt` holds things and phrases, one per line: the names of ImageNet's classes that consist
of known words, and the most frequent countable nouns that are seldom another part of speech.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

from benchmarks.command import new_parser
from fasterase.files import write_text

WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
EVERYDAY = 2000
# log10 of how much rarer the past tense is.
SELDOM_A_VERB = 0.75
# Listed as nouns too, in dictionaries.
FUNCTION = {"its", "our", "their", "which", "whose", "you", "your", "his", "her", "him", "them"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both lists."""
    import lemminflect
    import wordfreq

    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("fasterase/word_lists"))
    output = parser.parse_args(arguments).output
    known = wordfreq.get_frequency_dict("en", wordlist="small")
    frequent = [word for word in known if WORD.fullmatch(word)]  # the most frequent first
    levels = defaultdict(list)
    for word in frequent:
        levels[round(wordfreq.zipf_frequency(word, "en"), 1)].append(word)
    lines = [f"{level}\t{' '.join(sorted(words))}\n" for level, words in sorted(levels.items())]
    write_text(output / "english.tsv", "".join(reversed(lines)))

    def frequency(words: Sequence[str]) -> float:
        return max((wordfreq.zipf_frequency(word, "en") for word in words), default=0.0)

    def is_thing(word: str) -> bool:
        lemmas = lemminflect.getAllLemmas(word)
        others = frequency(lemminflect.getInflection(word, "VBD")) if "VERB" in lemmas else 0.0
        is_noun = word in lemmas.get("NOUN", ()) and set(lemmas) <= {"NOUN", "VERB"}
        return is_noun and frequency([word]) - others >= SELDOM_A_VERB

    classes = [name.lower() for name in IMAGENET_CLASSNAMES]
    everyday = {name for name in classes if set(re.findall(r"\w+", name)) <= known.keys()}
    for word in frequent:
        if len(everyday) == EVERYDAY:
            break
        plural = lemminflect.getInflection(word, "NNS")
        frequent_plural = set(plural) & known.keys()
        if len(word) > 2 and word not in FUNCTION and is_thing(word) and frequent_plural:
            everyday.add(word)
    write_text(output / "everyday.txt", "\n".join(sorted(everyday)) + "\n")


if __name__ == "__main__":
    main()
