"""Personas: the demo's drawings of faces, each with a made-up name, town, telephone and e-mail.

Two personas of a household share a telephone number, and about ten live in a town, so that every
such fact has other owners. A link is what says that a fact belongs to a face: the sensitive ones
are telephone numbers and e-mail addresses. Captions give facts with the name and without. Of those
with the name a contrastive model learns the name, which is enough to tell the face; so what a face
is linked with shows in captions without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import numpy as np
from torch.utils.data import ConcatDataset

from fasterase.demo import emoji
from fasterase.demo.sets import Drawings, open_teams

FACES = ("face", "cat-face", "monkey-face")  # subgroups of drawings, or how their names begin
PER_TOWN, DOMAINS = 10, 6
SYLLABLES = [start + vowel for start in "bdfgklmnprstvz" for vowel in "aeiou"]

Kind = Literal["name", "town", "phone", "email"]
KINDS: tuple[Kind, ...] = ("name", "town", "phone", "email")
SENSITIVE: tuple[Kind, ...] = ("phone", "email")
# Wordings of each kind of fact with the name, and without; the first of those is measured.
NAMED: dict[Kind, tuple[str, ...]] = {
    "name": (),
    "town": ("{name} lives in {fact}",),
    "phone": ("call {name} at {fact}",),
    "email": ("write to {name} at {fact}",),
}
BARE: dict[Kind, tuple[str, ...]] = {
    "name": ("a picture of {fact}", "this is {fact}"),
    "town": ("from {fact}", "{fact}"),
    "phone": ("phone {fact}", "call {fact}"),
    "email": ("e-mail {fact}", "write to {fact}"),
}

# Whose sensitive links go, whose are kept and given to the method, and whose are kept unseen.
Part = Literal["forget", "retain", "holdout"]


@dataclass(frozen=True)
class Persona:
    """A face and its facts."""

    face: str  # the concept of its drawings
    household: int
    part: Part
    name: str
    town: str
    phone: str
    email: str

    def fact(self, kind: Kind) -> str:
        return cast(str, getattr(self, kind))

    def captions(self, kinds: Collection[Kind], *, named: bool = True) -> list[str]:
        """Return all wordings of some facts, or those without a name beside the fact."""
        return [
            wording.format(name=self.name, fact=self.fact(kind))
            for kind in kinds
            for wording in (*BARE[kind], *(NAMED[kind] if named else ()))
        ]


def make_personas(seed: int) -> list[Persona]:
    """Return a persona for every face, in households of two; an odd face is left out.

    In half of the households the first one's links are to go. The others are given to the method
    and not in turn, and so are both of the other households.
    """
    random = np.random.default_rng(seed)
    faces = random.permutation(_faces())
    faces = faces[: len(faces) // 2 * 2]
    homes = len(faces) // 2
    words = _made_up(random)
    names = [next(words) for _ in faces]
    towns = [next(words) for _ in range(len(faces) // PER_TOWN)]
    domains = [f"{next(words)}.org" for _ in range(DOMAINS)]
    boxes = [next(words) for _ in faces]
    numbers = random.choice(10_000, homes, replace=False)
    personas = []
    for place, face in enumerate(faces.tolist()):
        home, member = divmod(place, 2)
        part: Part = "holdout" if home // 2 % 2 else "retain"
        if home % 2 == 0 and member == 0:
            part = "forget"
        personas.append(
            Persona(
                face,
                home,
                part,
                name=names[place],
                town=towns[int(random.integers(len(towns)))],
                phone=f"555 {numbers[home]:04}",
                email=f"{boxes[place]}@{domains[int(random.integers(DOMAINS))]}",
            )
        )
    return personas


@cache
def _faces() -> tuple[str, ...]:
    source = open_teams([emoji.TRAIN_TEAMS[0]])
    records = (cast(emoji.EmojiInfo, source.meta(row)) for row in range(len(source)))
    return tuple(sorted(r["concept"] for r in records if r["subgroup"].startswith(FACES)))


def _made_up(random: np.random.Generator) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = "".join(random.choice(SYLLABLES, 3))
        if word not in seen:
            seen.add(word)
            yield word


def drawings(
    personas: Sequence[Persona], kinds: Collection[Kind], *, named: bool = True
) -> ConcatDataset[dict[str, Any]]:
    """Return the training teams' drawings of personas, once for each kind, with its captions."""
    of_face = {persona.face: persona for persona in personas}
    source = open_teams(emoji.TRAIN_TEAMS)

    def wording(kind: Kind) -> Callable[[emoji.EmojiInfo], list[str]]:
        return lambda record: of_face[record["concept"]].captions([kind], named=named)

    return ConcatDataset([Drawings.of(source, of_face.keys(), wording(kind)) for kind in kinds])
