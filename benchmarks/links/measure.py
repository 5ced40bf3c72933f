"""How well a model knows whose a fact is: the rank of each fact among all of its kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.links.models import faces, usual_pairs
from benchmarks.links.personas import BARE, Kind, Persona
from fasterase.demo import emoji
from fasterase.models.dual_encoder import DualEncoder

AT_ONCE = 4096  # captions that are encoded together


class Known(NamedTuple):
    """How well facts are found, one value per persona and team."""

    residue: Tensor  # share of other facts of the kind that the own one is above: .5 by chance
    hit: Tensor  # bool: above all of them

    @classmethod
    def of(cls, own: Tensor, others: Tensor, is_other: Tensor) -> Known:
        """Compare `own` [n] with `others` [n, m] where `is_other`; ties are lost."""
        below = ((own[:, None] > others) & is_other).sum(1).double() / is_other.sum(1)
        return cls(below, below == 1)


class Features(NamedTuple):
    """What a model makes of all personas."""

    model: DualEncoder
    personas: Sequence[Persona]
    images: dict[str, Tensor]  # team -> [personas, D]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: DualEncoder, personas: Sequence[Persona]) -> Features:
        images = {
            team: model.encode_image(torch.stack([faces(team)[p.face] for p in personas]))
            for team in emoji.TEAMS
        }
        return cls(model, personas, images)

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Return the features [n, D] of captions."""
        parts = [captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE)]
        return torch.cat([self.model.encode_text(self.model.tokenize(part)) for part in parts])

    def facts(self, kind: Kind, *, of: Collection[int], teams: Sequence[str]) -> Known:
        """Rank all facts of a kind, in captions of nothing else, for faces `of` some personas."""
        values = sorted({each.fact(kind) for each in self.personas})
        rows = list(of)
        place = torch.tensor([values.index(self.personas[row].fact(kind)) for row in rows])
        texts = self.texts([BARE[kind][0].format(fact=value) for value in values])
        is_other = torch.arange(len(values)) != place[:, None]
        found = []
        for team in teams:
            scores = self.images[team][rows] @ texts.T
            own = scores.gather(1, place[:, None])[:, 0]
            found.append(Known.of(own, scores, is_other))
        return _joined(found)

    def owners(self, kind: Kind, *, of: Collection[int], teams: Sequence[str]) -> Known:
        """Rank the faces for the fact of some personas, without its other owners."""
        rows = list(of)
        facts = [each.fact(kind) for each in self.personas]
        texts = self.texts([BARE[kind][0].format(fact=facts[row]) for row in rows])
        is_other = torch.tensor([[other != facts[row] for other in facts] for row in rows])
        found = []
        for team in teams:
            scores = texts @ self.images[team].T
            found.append(Known.of(scores[range(len(rows)), rows], scores, is_other))
        return _joined(found)

    @torch.inference_mode()
    def usual_recall(self, without: Collection[str]) -> float:
        """Return the image->text recall@1 on the demo's drawings `without` some concepts."""
        images, records = usual_pairs()
        rows = [i for i, record in enumerate(records) if record["concept"] not in without]
        texts = self.texts([record["concept"] for record in records])
        own = torch.tensor(rows)
        hits = [(self.model.encode_image(team[rows]) @ texts.T).argmax(1) == own for team in images]
        return torch.stack(hits).float().mean().item()


def _joined(found: Sequence[Known]) -> Known:
    return Known(*(torch.cat(values) for values in zip(*found, strict=True)))
