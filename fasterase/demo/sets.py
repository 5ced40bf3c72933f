"""The demo's pair sets: to forget, to keep, and only to measure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from fasterase.demo import emoji
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.pairs.table import PairTable

# Share of the kept concepts that the run never sees.
HOLDOUT_SHARE = 0.25
NEIGHBOURS_PER_CONCEPT = 5


class Drawings(Dataset[dict[str, Any]]):
    """Drawings of some concepts as `{"image", "text"}`; `wording` makes the text from the record.

    `names` holds the concept of each drawing.
    """

    def __init__(
        self, source: PairTable, rows: list[int], wording: Callable[[emoji.EmojiInfo], list[str]]
    ) -> None:
        self._source = source
        self._rows = rows
        self._wording = wording
        self.names = [source.meta(row)["concept"] for row in rows]

    @classmethod
    def of(
        cls,
        source: PairTable,
        concepts: Collection[str],
        wording: Callable[[emoji.EmojiInfo], list[str]] = emoji.name_only,
    ) -> Drawings:
        """Return every drawing in `source` of any of the concepts."""
        rows = [row for row in range(len(source)) if source.meta(row)["concept"] in concepts]
        return cls(source, rows, wording)

    def reworded(self, wording: Callable[[emoji.EmojiInfo], list[str]]) -> Drawings:
        """Return the same drawings with other captions."""
        return Drawings(self._source, self._rows, wording)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[self._rows[index]]
        return {"image": record.image, "text": self._wording(cast(emoji.EmojiInfo, record.meta))}


@dataclass(frozen=True)
class DemoSets:
    """Pair sets of one erasure; kept concepts are split, by concept, into retain and holdout."""

    concepts: list[str]  # names of the forgotten concepts
    forget: Drawings  # theirs by the training teams, with all wordings
    retain: Drawings  # three quarters of the other member concepts
    holdout: Drawings  # the last quarter
    unseen: Drawings  # to be forgotten too: theirs by a team whose pictures no model has seen
    neighbour: Drawings  # of the kept concepts nearest to them in the original's text features


def open_teams(teams: Sequence[str]) -> PairTable:
    """Open the teams' drawings through the WebDataset reader."""
    shards = [str(path) for team in teams for path in emoji.shards(team)]
    return open_pairs("::".join(shards), name=" and ".join(teams))


def _choose_concepts(records: list[emoji.EmojiInfo], expression: str) -> set[str]:
    """Return the concepts of a group or subgroup, or those with names matching an expression.

    Raises:
        InputError: no concept or every concept is chosen, or the expression is not valid.
    """
    for level in ("group", "subgroup"):
        chosen = {record["concept"] for record in records if record[level] == expression}
        if chosen:
            return chosen
    try:
        pattern = re.compile(expression, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"forget={expression!r} is not a valid expression: {error}") from error
    chosen = {record["concept"] for record in records if pattern.search(record["concept"])}
    if not chosen or len(chosen) == len({record["concept"] for record in records}):
        known = sorted({record["subgroup"] for record in records})
        raise InputError(
            f"forget={expression!r} chooses {'every' if chosen else 'no'} concept. Give a group "
            f"or subgroup ({', '.join(known)}) or an expression that some names match."
        )
    return chosen


def build_sets(expression: str, *, original: str, seed: int) -> DemoSets:
    """Build the sets to forget the concepts that `expression` chooses from the base's training set.

    Neighbours are near in the text features of `original`; `seed` splits retain and holdout.

    Raises:
        InputError: see `_choose_concepts`.
    """
    trained, unseen = open_teams(emoji.TRAIN_TEAMS), open_teams([emoji.UNSEEN_TEAM])
    records = [cast(emoji.EmojiInfo, trained.meta(row)) for row in range(len(trained))]
    members = [record for record in records if record["member"]]
    chosen = _choose_concepts(members, expression)
    kept = sorted({record["concept"] for record in members} - chosen)
    order = np.random.default_rng(seed).permutation(len(kept))
    held_out = {kept[i] for i in order[: int(len(kept) * HOLDOUT_SHARE)]}
    near = _nearest(load_model(original), sorted(chosen), kept)
    return DemoSets(
        concepts=sorted(chosen),
        forget=Drawings.of(trained, chosen, emoji.captions),
        retain=Drawings.of(trained, set(kept) - held_out),
        holdout=Drawings.of(trained, held_out),
        unseen=Drawings.of(unseen, chosen),
        neighbour=Drawings.of(trained, near),
    )


def _nearest(model: DualEncoder, chosen: list[str], kept: list[str]) -> set[str]:
    with torch.no_grad():
        own = model.encode_text(model.tokenize(chosen))
        others = model.encode_text(model.tokenize(kept))
    closeness = (others @ own.T).amax(1)
    count = min(len(kept), NEIGHBOURS_PER_CONCEPT * len(chosen))
    return {kept[i] for i in closeness.topk(count).indices.tolist()}
