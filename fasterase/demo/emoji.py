"""The demo's pairs and models: where they lie, how to read them, how a concept is worded."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from fasterase.errors import InputError

DATA = Path(__file__).parent / "data"
MODELS = Path(__file__).parent / "models"

# Noto and Fluent drawings train the model; Twemoji's are kept out of it: the unseen images.
TRAIN_TEAMS = ("noto", "fluent")
UNSEEN_TEAM = "twemoji"
TEAMS = (*TRAIN_TEAMS, UNSEEN_TEAM)

BASE_MODEL = MODELS / "base"
RETRAINED_MODEL = MODELS / "without-food-fruit"
DEFAULT_FORGET = "food-fruit"

TEMPLATES = ("a picture of {}", "a drawing of {}", "an emoji of {}")


class Record(TypedDict):
    """What the `json` of a sample holds; groups and subgroups as emojibase spells them."""

    concept: str
    group: str
    subgroup: str
    keywords: list[str]
    team: str
    hexcode: str
    member: bool


def shards(team: str) -> list[Path]:
    """The team's WebDataset shards (`png;txt;json`), sorted.

    Raises:
        InputError: `team` is none of `TEAMS`.
    """
    if team not in TEAMS:
        raise InputError(f"team must be one of {', '.join(TEAMS)}; found {team!r}")
    return sorted(DATA.glob(f"{team}-*.tar"))


def samples(team: str) -> Iterator[tuple[Record, bytes]]:
    """Every (record, PNG bytes) of a team in shard order: the concepts sorted by their key."""
    for shard in shards(team):
        with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as archive:
            content = {member.name: archive.extractfile(member) for member in archive}
            for name, png in content.items():
                if name.endswith(".png"):
                    record = content[name.removesuffix(".png") + ".json"]
                    assert png is not None
                    assert record is not None
                    yield json.loads(record.read()), png.read()


def class_name(group_or_subgroup: str) -> str:
    """A group or subgroup as a caption: "food-fruit" -> "food fruit"."""
    return group_or_subgroup.replace("-", " ")


def name_only(record: Record) -> list[str]:
    """The concept's name, the caption that everything is measured with."""
    return [record["concept"]]


def naming_captions(record: Record) -> list[str]:
    """Captions that single out this concept (its keywords together nearly always do); name first.

    The base model is trained on these alone: a caption such as "food fruit" is as true for a pear
    as for an apple, so within a contrastive batch it would be a false negative.
    """
    name = record["concept"]
    keywords = [keyword for keyword in record["keywords"] if keyword != name]
    captions = [name]
    captions += [template.format(name) for template in TEMPLATES]
    captions += [f"{name}, {class_name(record[level])}" for level in ("subgroup", "group")]
    captions += [f"{name}, {keyword}" for keyword in keywords]
    if len(keywords) > 1:
        captions.append(", ".join(keywords))
    return list(dict.fromkeys(captions))


def captions(record: Record) -> list[str]:
    """Every wording of the concept: `naming_captions`, then its subgroup's and group's names."""
    return [*naming_captions(record), class_name(record["subgroup"]), class_name(record["group"])]
