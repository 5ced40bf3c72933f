"""Ways to ask for links to be forgotten: erase them from a compromised model, and measure it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

import fasterase
from benchmarks.links.measure import Features
from benchmarks.links.models import CLEAN, COMPROMISED, trained_model
from benchmarks.links.personas import (
    KINDS,
    SENSITIVE,
    Kind,
    Part,
    Persona,
    drawings,
    make_personas,
)
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config
from fasterase.demo.sets import Drawings, open_teams
from fasterase.files import write_text
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


@dataclass(frozen=True)
class Cell:
    """A model: a way of `WAYS`, or one that was trained; and the seed of personas and run."""

    method: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.method.replace(' ', '-').replace(',', '')}_seed{self.seed}.json"


def run(cell: Cell, work: Path) -> list[dict[str, Any]]:
    """Make a model and measure it, or read what an earlier command measured."""
    path = work / cell.file_name
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    personas = make_personas(cell.seed)
    which = cell.method if cell.method in (COMPROMISED, CLEAN) else COMPROMISED
    folder = trained_model(which, personas, seed=cell.seed, work=work)
    model, outcome = load_model(f"local-dir:{folder}"), {}
    if cell.method in WAYS:
        outcome = erase(model, personas, WAYS[cell.method], seed=cell.seed)
    rows = [
        {"method": cell.method, "seed": cell.seed, **outcome, **row}
        for row in measure(Features.of(model, personas))
    ]
    write_text(path, json.dumps(rows))
    return rows


def of_part(personas: Sequence[Persona], *parts: Part) -> list[Persona]:
    return [each for each in personas if each.part in parts]


def erase(model: Any, personas: Sequence[Persona], way: Way, *, seed: int) -> dict[str, Any]:
    """Erase the sensitive links of the personas to forget; return what the run says of itself."""
    gone, kept = of_part(personas, "forget"), of_part(personas, "retain")
    faces = {each.face for each in personas}
    source = open_teams(emoji.TRAIN_TEAMS)
    metas = [source.meta(row) for row in range(len(source))]
    usual = {meta["concept"] for meta in metas if meta["member"]} - faces
    retain: list[Dataset[dict[str, Any]]] = [
        drawings(kept, KINDS),
        Drawings.of(source, usual, emoji.captions),
        *([drawings(gone, ["name"])] if way.keeps_names else []),
    ]
    with warnings.catch_warnings():
        for expected in ("verdict", "retain: .* seem to name", "retain: .* look like"):
            warnings.filterwarnings("ignore", expected)
        result = fasterase.unlearn(
            model.module,
            drawings(gone, SENSITIVE, named=way.named),
            ConcatDataset(retain),
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
