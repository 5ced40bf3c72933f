"""Ways to ask for links to be forgotten: erase them from a compromised model, and measure it.

Whose a fact is shows in its rank among all facts of its kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

import fasterase
from benchmarks.links.models import CLEAN, COMPROMISED, faces, trained_model, usual_pairs
from benchmarks.links.personas import (
    BARE,
    KINDS,
    SENSITIVE,
    Kind,
    Part,
    Persona,
    drawings,
    make_personas,
)
from benchmarks.result_files import keep_json
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config
from fasterase.demo.sets import Drawings, open_teams
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model


@dataclass(frozen=True)
class Way:
    """A way to ask for the links to be forgotten."""

    title: str
    named: bool = False  # some forget captions have the personas' names, as the model learnt them
    keeps_names: bool = False  # the names of these faces are in the retain set
    recipe: str = "fasterase"
    erase: str = "concept"


WAYS = {
    way.title: way
    for way in (
        Way("default"),
        Way("default, names in forget captions", named=True),
        Way("paper's recipe", recipe="cliperase"),
        Way("link", erase="link"),
        Way("link, names kept", erase="link", keeps_names=True),
    )
}
TRAINED, UNSEEN = "trained drawings", "unseen drawings"
TEAMS = {TRAINED: emoji.TRAIN_TEAMS, UNSEEN: (emoji.UNSEEN_TEAM,)}
USUAL = "the demo's drawings"
ATTACKED = "attack"
# The figures of each attack that the table keeps.
ATTACKS = {
    "swap": ("forget/original_images/contest_hit@1", "forget/original_texts/contest_hit@1"),
    "membership": ("forget/cosine/auc",),
    "relearn": ("forget/area/contest_hit@1", "forget/made_up/area/contest_hit@1"),
}
AT_ONCE = 4096  # captions that are encoded together
STRANGERS = 1000  # added to the seed of those whose facts nobody has


@dataclass(frozen=True)
class Cell:
    """A model: a way of `WAYS`, or one that was trained; and the seed of personas and run."""

    method: str
    seed: int


def run(cell: Cell, work: Path) -> list[dict[str, Any]]:
    """Make a model and measure it, or read what an earlier command measured."""
    name = f"{cell.method.replace(' ', '-').replace(',', '')}_seed{cell.seed}.json"
    rows: list[dict[str, Any]] = keep_json(work / name, lambda: _rows_of(cell, work))
    return rows


def _rows_of(cell: Cell, work: Path) -> list[dict[str, Any]]:
    personas = make_personas(cell.seed)
    which = cell.method if cell.method in (COMPROMISED, CLEAN) else COMPROMISED
    folder = trained_model(which, personas, seed=cell.seed, work=work)
    model, outcome = load_model(f"local-dir:{folder}"), {}
    if cell.method in WAYS:
        outcome = erase(model, personas, WAYS[cell.method], seed=cell.seed)
    return [
        {"method": cell.method, "seed": cell.seed, **outcome, **row}
        for row in [*measure(Features.of(model, personas)), *attack(model, personas, cell, work)]
    ]


def of_part(personas: Sequence[Persona], *parts: Part) -> list[Persona]:
    return [each for each in personas if each.part in parts]


def attack(
    model: DualEncoder, personas: Sequence[Persona], cell: Cell, work: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row per figure of the attacks on the links to forget."""
    compromised = trained_model(COMPROMISED, personas, seed=cell.seed, work=work)
    evaluation = fasterase.evaluate(
        model.module,
        drawings(of_part(personas, "forget"), SENSITIVE, named=False),
        kept_pairs(personas),
        original=f"local-dir:{compromised}",
        attacks=tuple(ATTACKS),
        max_pairs=1000,
        non_members=drawings(never_linked(personas, cell.seed), SENSITIVE, named=False),
        tokenizer=model.text_tokenizer,
        preprocess=model.image_transform,
        progress=False,
    )
    for name, findings in evaluation.attacks.items():
        for finding in findings.values():
            if finding.key in ATTACKS[name]:
                yield {"set": ATTACKED, "fact": f"{name}: {finding.key}", "value": finding.value}


def never_linked(personas: Sequence[Persona], seed: int) -> list[Persona]:
    """Return the personas to forget with facts that nobody has."""
    known = {each.phone for each in personas}
    others = [each for each in make_personas(seed + STRANGERS) if each.phone not in known]
    gone = of_part(personas, "forget")
    return [
        replace(persona, phone=other.phone, email=other.email)
        for persona, other in zip(gone, others, strict=False)
    ]


def kept_pairs(personas: Sequence[Persona]) -> ConcatDataset[dict[str, Any]]:
    """Return the facts of others that are given, and the demo's drawings without the faces."""
    faces = {each.face for each in personas}
    source = open_teams(emoji.TRAIN_TEAMS)
    metas = [source.meta(row) for row in range(len(source))]
    usual = {meta["concept"] for meta in metas if meta["member"]} - faces
    kept = of_part(personas, "retain")
    return ConcatDataset([drawings(kept, KINDS), Drawings.of(source, usual, emoji.captions)])


def erase(model: Any, personas: Sequence[Persona], way: Way, *, seed: int) -> dict[str, Any]:
    """Erase the sensitive links of the personas to forget; return what the run says of itself."""
    gone, retain = of_part(personas, "forget"), kept_pairs(personas)
    if way.keeps_names:
        retain = ConcatDataset([retain, drawings(gone, ["name"])])
    with warnings.catch_warnings():
        for expected in ("verdict", "retain: .* seem to name", "retain: .* look like"):
            warnings.filterwarnings("ignore", expected)
        result = fasterase.unlearn(
            model.module,
            drawings(gone, SENSITIVE, named=way.named),
            retain,
            config=recipe_config(
                way.recipe, small_model=True, seed=seed, erase=way.erase, progress=False
            ),
            tokenizer=model.text_tokenizer,
            preprocess=model.image_transform,
        )
    return {"verdict": result.verdict, "steps": len(result.history)}


def measure(found: Features) -> Iterator[dict[str, Any]]:
    """Yield what a model knows, a row per set, fact, direction and drawings."""
    personas = found.personas
    households = {each.household for each in of_part(personas, "forget")}
    mates = [p for p in personas if p.household in households and p.part != "forget"]
    sets: dict[str, tuple[list[Persona], Sequence[Kind]]] = {
        "forget": (of_part(personas, "forget"), SENSITIVE),
        "holdout_association": (of_part(personas, "forget"), ("name", "town")),
        "holdout_identity": (of_part(personas, "holdout"), SENSITIVE),
        "same number": (mates, ("phone",)),
        "retain": (of_part(personas, "retain"), KINDS),
    }
    for name, (those, kinds) in sets.items():
        rows = [personas.index(each) for each in those]
        for kind in kinds:
            for direction, known in (("face->fact", found.facts), ("fact->face", found.owners)):
                for drawn, teams in TEAMS.items():
                    residue, hit = known(kind, of=rows, teams=teams)
                    yield {
                        "set": name,
                        "fact": kind,
                        "direction": direction,
                        "drawings": drawn,
                        "residue": residue.mean().item(),
                        "hit@1": hit.double().mean().item(),
                    }
    recall = found.usual_recall({each.face for each in personas})
    yield {"set": USUAL, "fact": "concept", "direction": "face->fact", "hit@1": recall}


class Known(NamedTuple):
    """How well facts are found, one value per persona and team."""

    residue: Tensor  # share of other facts of the kind that the own one is above: .5 by chance
    hit: Tensor  # bool: above all of them

    @classmethod
    def of(cls, own: Tensor, others: Tensor, is_other: Tensor) -> Known:
        """Compare `own` [n] with `others` [n, m] where `is_other`; ties are lost."""
        below = ((own[:, None] > others) & is_other).sum(1).double() / is_other.sum(1)
        return cls(below, below == 1)

    @classmethod
    def join(cls, found: Sequence[Known]) -> Known:
        return cls(*(torch.cat(values) for values in zip(*found, strict=True)))


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
        return Known.join(found)

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
        return Known.join(found)

    @torch.inference_mode()
    def usual_recall(self, without: Collection[str]) -> float:
        """Return the image->text recall@1 on the demo's drawings `without` some concepts."""
        images, records = usual_pairs()
        rows = [i for i, record in enumerate(records) if record["concept"] not in without]
        texts = self.texts([record["concept"] for record in records])
        own = torch.tensor(rows)
        hits = [(self.model.encode_image(team[rows]) @ texts.T).argmax(1) == own for team in images]
        return torch.stack(hits).float().mean().item()
